"""Records as other projects write them: what they mean here, what they are refused for, what stays text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.sample import Sample, parse_sample
from tests.data_fixtures import record, turns

ANSWER = {"role": "assistant", "content": "A cat."}
IMAGE_PART = {"type": "image", "image": "a.jpg"}
TEXT_PART = {"type": "text", "text": "What?"}
NATIVE = parse_sample(record("<ImageHere>What?", "A cat.", images=["a.jpg"]))


def asked(content, **fields):
    return {"messages": [{"role": "user", "content": content}, ANSWER], **fields}


@pytest.mark.parametrize(
    "other",
    [
        {"image": "a.jpg", "conversations": turns("<image>What?", "A cat.")},
        {"images": ["a.jpg"], "conversations": turns("<image>What?", "A cat.")},
        {"images": "a.jpg", "image": ["a.jpg"], "messages": turns("<ImageHere>What?", "A cat.")},
        {"image": None, "images": ["a.jpg"], "video": [], "messages": turns("<image>What?", "A cat.")},
        asked("<image>What?", images=["a.jpg"]),
        asked("<ImageHere>What?", image="a.jpg", conversations=[]),
        asked([IMAGE_PART, TEXT_PART]),
        asked([IMAGE_PART, TEXT_PART], images=["a.jpg"]),
        asked([{"type": "image", "text": None}, {**TEXT_PART, "image": None}], images=["a.jpg"]),
        asked([{"type": "image_url", "image_url": {"url": "a.jpg"}}, TEXT_PART]),
        asked([{"type": "text", "text": "<image>What?"}], images=["a.jpg"]),
    ],
)
def test_what_other_projects_write_means_the_same(other):
    assert parse_sample(other) == NATIVE


def test_image_parts_without_a_path_take_the_listed_images_in_order():
    part = {"type": "image"}
    messages = [
        {"role": "user", "content": [TEXT_PART, part, part]},
        ANSWER,
        {"role": "user", "content": [part]},
        ANSWER,
    ]
    sample = parse_sample({"messages": messages, "images": ["c", "b", "a"]})
    assert [text for _, text in sample.turns] == [
        "What?<ImageHere><ImageHere>",
        "A cat.",
        "<ImageHere>",
        "A cat.",
    ]
    assert sample.images == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("text", "images", "expected", "image_first"),
    [
        ("<image>1", [], "<image>1", False),
        ("<image>1<ImageHere>", ["a"], "<image>1<ImageHere>", False),
        ("<image>1<ImageHere>", ["a", "b"], "<ImageHere>1<ImageHere>", False),
        ("<Image<image>Here>", ["a"], "<Image<ImageHere>Here>", False),
        ("<video>1", ["a"], "<video>1", True),
    ],
)
def test_image_tags_are_placeholders_only_where_the_counts_need_them(text, images, expected, image_first):
    sample = parse_sample(record(text, "2", images=images))
    assert sample.turns[0] == ("user", expected)
    assert sample.image_first == image_first
    assert bool(sample.tags_as_text) == ("<image>" in expected or "<video>" in expected)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (record("<image><image>", "2", images=["a"]), "0 <ImageHere> and 2 <image> but 1 images"),
        (record("<image><ImageHere>", "2"), "1 <ImageHere> but 0 images"),
        ({**record("1", "2"), "image": ["a"], "images": ["b"]}, "'image' and 'images', and they differ"),
        (asked("1", conversations=turns("1", "2")), "'conversations' and 'messages', and they differ"),
        ({"messages": []}, "non-empty list, not an empty list, as 'messages'"),
        (asked([]), "turn 0 has an empty list as its text"),
        (asked(["What?"]), "turn 0 has a part without a type"),
        (asked([{"type": "input_audio", "input_audio": {}}]), "turn 0 has a part of the type 'input_audio'"),
        (asked([{"type": "text"}]), "turn 0 has a part of the type 'text'"),
        (asked([{"type": "image", "image": 7}]), "turn 0 has a part with a number as 'image'"),
        (asked([IMAGE_PART, {"type": "image"}], images=["b"]), "a path in some of its image parts"),
        (asked([IMAGE_PART], images=["b"]), "images in its parts and others under 'images'"),
        (asked([{"type": "image"}]), "1 <ImageHere> but 0 images"),
        (record("<image>", "2", images=["https://example.org/a.jpg"]), "the URL 'https://example.org/a.jpg'"),
        (
            asked([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]),
            "the URL 'data:",
        ),
        ({**record("1", "2"), "image": float("nan")}, "has NaN, which is not JSON, as 'image'"),
        (
            {**record("<video>1", "2"), "video": "a.mp4"},
            "has 'video', but the model takes only text and images",
        ),
        ({**record("1", "2"), "audio": ["a.wav"]}, "has 'audio', but"),
        ({"conversations": [{"from": "user", "content": "1"}]}, "turn 0 must be an object with 'from' and"),
    ],
)
def test_what_would_train_wrongly_is_refused(item, message):
    with pytest.raises(DataError) as caught:
        parse_sample(item)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_keys_are_told():
    assert parse_sample({**record("1", "2"), "sorce": 1, "imgae": "a"}).unknown_keys == ("imgae", "sorce")


marks = st.sampled_from(["<ImageHere>", "<image>", "<", "x", "Image", "Here>", " "])


@given(
    texts=st.lists(st.lists(marks, max_size=6).map("".join), min_size=1, max_size=3), num=st.integers(0, 4)
)
def test_a_sample_has_a_placeholder_for_each_image_or_is_refused(texts, num):
    images = [f"{index}.jpg" for index in range(num)]
    conversation = [{"from": "user", "value": text} for text in texts] + turns("", "answer")[1:]
    before = [sum(text.count(mark) for text in texts) for mark in ("<ImageHere>", "<image>")]
    try:
        sample: Sample = parse_sample({"conversations": conversation, "images": images})
    except DataError:
        assert num not in (before[0], sum(before))
        return
    after = sum(text.count("<ImageHere>") for _, text in sample.turns)
    assert after == num or (sample.image_first and num == 1 and before == [0, 0])
    if before[0] == num:
        assert [text for _, text in sample.turns[:-1]] == [text.strip() for text in texts]
