"""Records as other projects write them: what they mean here, what they are refused for, what stays text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.records import Records
from data.sample import Sample, parse_sample
from tests.data_fixtures import record, turns, write_json

ANSWER = {"role": "assistant", "content": "A cat."}
IMAGE_PART = {"type": "image", "image": "a.jpg"}
TEXT_PART = {"type": "text", "text": "What?"}
TEXT_TURN = {"role": "user", "content": "What?"}
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


def in_every_format(conversation, paths, listed):
    """A conversation of (role, [text or None for an image, …]) in our form, LLaVA's and OpenAI's.

    listed: OpenAI's image parts take their paths from `images`; else each has its own, as a URL or as a path.
    """
    urls = iter("file://" + path.replace(" ", "%20") for path in paths)

    def with_placeholders(placeholder, human, gpt):
        names = {"user": human, "assistant": gpt, "system": "system"}
        return [
            {"from": names[role], "value": "".join(placeholder if part is None else part for part in parts)}
            for role, parts in conversation
        ]

    def part_of(text):
        if text is not None:
            return {"type": "text", "text": text}
        url = next(urls)
        if listed:
            return {"type": "image"}
        if url.endswith("0.jpg"):
            return {"type": "image", "image": url}
        return {"type": "image_url", "image_url": {"url": url}}

    messages = [
        {"role": role, "content": "".join(parts) if None not in parts else [*map(part_of, parts)]}
        for role, parts in conversation
    ]
    images = paths[0] if len(paths) == 1 else paths
    return [
        {"id": 7, "image": paths, "conversations": with_placeholders("<ImageHere>", "user", "assistant")},
        {"id": 7, "image": images, "conversations": with_placeholders("<image>", "human", "gpt")},
        {"id": 7, "images": images, "conversations": with_placeholders("<image>", "Human", "bot")},
        {"id": 7, "messages": messages, **({"images": paths} if listed else {})},
    ]


texts = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=8)
parts_of_turn = st.lists(st.none() | texts, min_size=1, max_size=4)
some_turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), parts_of_turn), max_size=4)


@settings(deadline=None)
@given(conversation=some_turns, listed=st.booleans())
def test_a_conversation_is_the_same_sample_in_every_format(tmp_path_factory, conversation, listed):
    num_images = sum(parts.count(None) for _, parts in conversation)
    paths = [f"/data/a cat {number}.jpg" for number in range(num_images)]
    conversation = [*conversation, ("assistant", ["A cat." if paths else "Write <image> there."])]
    path = tmp_path_factory.getbasetemp() / "formats.json"
    records = Records(write_json(path, in_every_format(conversation, paths, listed)))
    native, *others = (parse_sample(records[index]) for index in range(len(records)))
    assert others == [native] * 3
    assert native.images == paths
    assert native.turns[-1] == ("assistant", conversation[-1][1][0])
    assert (records.num_images, records.problems) == (4 * num_images, [])


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///data/a.jpg", "/data/a.jpg"),
        ("FILE://localhost/data/my%20cat%C3%A9.jpg", "/data/my caté.jpg"),
        ("/data/my%20cat.jpg", "/data/my%20cat.jpg"),
        ("file.jpg", "file.jpg"),
    ],
)
def test_the_url_of_a_file_is_its_path(url, path):
    assert parse_sample(record("<ImageHere>", "2", images=[url])).images == [path]


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
        (record("1", "2", images=["file://data/a.jpg"]), "the URL 'file://data/a.jpg'"),
        (asked([{"type": "image_url", "image_url": {"url": "HTTP://a.org/b"}}]), "the URL 'HTTP://a.org/b'"),
        (asked([{"type": "image_url", "image_url": {"url": ["a.jpg"]}}]), "a list as 'image_url'"),
        (asked([{"type": "image"}], images=["a", "b"]), "1 <ImageHere> but 2 images"),
        (asked([IMAGE_PART, {**TEXT_PART, "text": "<ImageHere>"}]), "2 <ImageHere> but 1 images"),
        (asked("1") | {"messages": [ANSWER, {"role": "tool", "content": "1"}]}, "the unknown role 'tool'"),
        (asked("1") | {"messages": [{"role": "assistant", "content": None}]}, "turn 0 has null as its text"),
        (asked("1") | {"messages": [{"role": "user", "content": "1"}]}, "no assistant turn"),
        ({**record("1", "2"), "image": float("nan")}, "has NaN, which is not JSON, as 'image'"),
        (
            {**record("<video>1", "2"), "video": "a.mp4"},
            "has 'video', but the model takes only text and images",
        ),
        ({**record("1", "2"), "audio": ["a.wav"]}, "has 'audio', but"),
        ({"conversations": [{"from": "user", "content": "1"}]}, "turn 0 must be an object with 'from' and"),
        (
            {"messages": [TEXT_TURN, ANSWER | {"weight": 0}]},
            "turn 1 has 'weight': 0, but every answer is trained on",
        ),
        ({"messages": [TEXT_TURN, ANSWER | {"loss": False}]}, "turn 1 has 'loss': False, but"),
        ({**record("1", "2"), "system": ["3"]}, "has a list as 'system'"),
        ({**record("1", "2"), "system": 0}, "has a number as 'system'"),
        ({"system": "3", "messages": [{"role": "system", "content": "4"}, ANSWER]}, "keep one of them"),
    ],
)
def test_what_would_train_wrongly_is_refused(item, message):
    with pytest.raises(DataError) as caught:
        parse_sample(item)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_asks_for_training_on_an_answer_changes_nothing_and_a_system_text_is_the_first_turn():
    weighed = {"messages": [TEXT_TURN | {"weight": 0}, ANSWER | {"weight": 1, "loss": True, "train": None}]}
    assert parse_sample(weighed) == parse_sample({"messages": [TEXT_TURN, ANSWER], "system": ""})
    as_turn = [{"role": "system", "content": "Be short."}, TEXT_TURN, ANSWER]
    as_key = {"messages": [TEXT_TURN, ANSWER], "system": " Be short. "}
    assert parse_sample(as_key) == parse_sample({"messages": as_turn})


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
