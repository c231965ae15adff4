"""The index of JSON files: what it finds and refuses, when it is used again, who may build it together."""

import json
import multiprocessing
import os
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.records as records_module
from data.errors import DataError, FileChangedError
from data.records import Records
from tests.data_fixtures import record, turns, write_json

GOOD = [
    record("1", "2", record_id="first"),
    record("浦语 <ImageHere>", "é\u2028\x85\U0001f600", images=["图.jpg"]),
    record('say "[{" and \\', "]},"),
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_array_reads_back(tmp_path, indent, ascii_only):
    path = tmp_path / "a.json"
    path.write_text(
        " \n" + json.dumps(GOOD, indent=indent, ensure_ascii=ascii_only) + "\n\n", encoding="utf-8"
    )
    records = Records(path)
    assert [records[index] for index in range(len(records))] == GOOD
    assert (records.num_images, records.problems) == (1, [])


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n \n"])
def test_lines_read_back(tmp_path, newline):
    path = tmp_path / "a.jsonl"
    text = newline.join(json.dumps(item, ensure_ascii=False) for item in GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    records = Records(path)
    assert [records[index] for index in range(len(records))] == GOOD


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100)
@given(values=st.lists(json_values, min_size=1, max_size=6), window=st.integers(1, 40), data=st.data())
def test_any_json_reads_back_through_any_window(tmp_path_factory, values, window, data):
    """Records cut by the window's end are found again."""
    folder = tmp_path_factory.mktemp("values")
    separators = (data.draw(st.sampled_from([",", " ,\n", ", "])), ": ")
    (folder / "a.json").write_text(json.dumps(values, separators=separators))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "WINDOW_BYTES", window)
        records = Records(folder / "a.json")
    assert [records[index] for index in range(len(records))] == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "contains no record"),
        (b"[]", "contains no record"),
        (b'[{"a": 1} {"b": 2}]', "'{' follows record 0 on line 1"),
        (b'[\n{"a": 1},\n{"b": 2}\n', "end of the file follows record 1 on line 4"),
        (b'[{"a": 1},\n{"b": }]', "record 1 is not JSON: line 2"),
        (b'[{"a": 1},]', "record 1 is not JSON"),
        (b'[{"a": "', "record 0 is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "record 0 is not JSON"),
        (b'[{"a": 1}]\n\n [{"b": 2}]', "'[' follows the end of the array on line 3; a file is one array"),
        (b'[{"a": 1}]]', "']' follows the end of the array on line 1"),
    ],
)
def test_a_file_that_is_not_json_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(DataError, match=r"a\.json") as caught:
        Records(tmp_path / "a.json")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (7, "must be an object"),
        ({"id": 3}, "has no 'conversations'"),
        ({"conversations": []}, "non-empty list, not an empty list"),
        ({"conversations": [{"from": "user"}]}, "turn 0 must be an object"),
        ({"conversations": [{"from": "sytem", "value": ""}]}, "unknown role 'sytem'"),
        ({"conversations": [{"from": "user", "value": None}]}, "turn 0 has null"),
        ({"conversations": turns("x", "\ud800")}, "surrogate"),
        ({"conversations": turns("x")}, "no assistant turn"),
        ({"conversations": turns("<ImageHere>", "y")}, "1 <ImageHere> but 0 images"),
        ({"conversations": turns("<ImageHere>", "y"), "image": ["a", "b"]}, "1 <ImageHere> but 2 images"),
        ({"conversations": turns("x", "y"), "image": ["a", "b"]}, "0 <ImageHere> but 2 images"),
        ({"conversations": turns("x", "y"), "image": [7]}, "'image' must be"),
        ({"conversations": turns("x", "y"), "image": {"path": "a"}}, "'image' must be"),
    ],
)
def test_a_bad_record_is_a_problem_with_its_index(tmp_path, item, message):
    (tmp_path / "a.json").write_text(json.dumps([record("1", "2"), item, record("1", "2")]))
    records = Records(tmp_path / "a.json")
    assert len(records) == 3
    ((index, what),) = records.problems
    assert index == 1
    assert message in what


def test_a_bad_line_is_a_problem_and_the_rest_is_read(tmp_path):
    lines = [
        json.dumps(record("1", "2")).encode(),
        b'{"a": ',
        b'"\xff"',
        json.dumps(record("3", "4")).encode(),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    records = Records(tmp_path / "a.jsonl")
    assert [index for index, _ in records.problems] == [1, 2]
    assert records[3] == record("3", "4")
    for index, message in ((1, "is not JSON"), (2, "is not UTF-8")):
        with pytest.raises(DataError, match=message):
            records[index]


# The original model's README gives its first record like this, with single quotes and without a comma.
README_SAMPLE = """[
    {
      "id": "0",
      "image": ['path/to/image_0.jpg', 'path/to/image_1.jpg']
      "conversations": [
        {"from": "user", "value": "<ImageHere> <ImageHere>Please describe these two images."}
      ]
    }
]"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (README_SAMPLE, """line 4, column 17: unexpected "'"; JSON needs double quotes (")"""),
        (README_SAMPLE.replace("'", '"'), 'line 5, column 7: a comma is missing before "conversations"'),
        ('[{"图": ["图.jpg"] "b": 1}]', 'line 1, column 18: a comma is missing before "b"'),
        ('[{"a": “b”}]', "line 1, column 8: unexpected '“'; JSON needs double quotes"),
        ('[{"a": 1,\n}]', "line 2, column 1: unexpected '}'; remove the trailing comma"),
        ('[{"a": 1},\n]', "record 1 is not JSON: line 2, column 1: unexpected ']'; remove the trailing"),
        ('[{"a": None}]', "line 1, column 8: unexpected None; write null in JSON"),
        ('[{"a": True}]', "unexpected True; write true in JSON"),
        ('[{"a": nan}]', "unexpected nan; write null in JSON"),
        ('[{"a": "say "hi" to"}]', "a comma is missing before hi, or the double quote before it is part of"),
        ('[{"a": "1\n2"}]', r"unexpected '\n' in a string; write \n for the end of a line"),
        (r'[{"a": "\d"}]', "in a string; write a backslash twice"),
        (r'[{"a": "\u12g4"}]', r"\u needs four hexadecimal digits"),
        ('[// c\n{"a": 1}]', "JSON has no comments"),
        ("[{a: 1}]", "unexpected a; expected a key in double quotes"),
        ('[{"a" 1}]', "unexpected 1; a key must be followed by a colon"),
        ('[{"a": 1', "the file ends within the record"),
        ('[{"a": "b', "line 1, column 8: the string that starts here is not closed"),
    ],
)
def test_what_is_not_json_is_said_with_its_place_and_remedy(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        Records(tmp_path / "a.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lines_that_are_not_json_are_said_with_their_place_in_the_file(tmp_path):
    good = json.dumps(record("浦语", "2"), ensure_ascii=False)
    lines = [good, "", "{'a': 1}", good, '{"浦": 1,}', "{", '{"a": 1},']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    records = Records(tmp_path / "a.jsonl")
    expected = {
        1: 'line 3, column 2: unexpected "\'"; JSON needs double quotes',
        3: "line 5, column 9: unexpected '}'; remove the trailing comma",
        4: "line 6, column 2: the line ends within the record; write a record on one line",
        5: "line 7, column 9: unexpected , after the record",
    }
    assert [index for index, _ in records.problems] == list(expected)
    for index, what in reversed(records.problems):
        assert expected[index] in what
        with pytest.raises(DataError) as caught:
            records[index]
        assert str(caught.value) == what


@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a pipe"), (os.mkdir, "a folder")])
def test_what_is_no_file_is_refused_at_once(tmp_path, make, kind):
    make(tmp_path / "a.json")
    with pytest.raises(DataError, match=f"a.json: is {kind}, not a file"):
        Records(tmp_path / "a.json")


def shorten(path):
    os.truncate(path, 100)


def rewrite(path):
    """At the same length."""
    text = path.read_bytes().replace(b"000", b"111")
    path.write_bytes(text)


def replace(path):
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes())
    os.replace(new, path)


@pytest.mark.parametrize("change", [shorten, rewrite, replace, os.unlink])
def test_a_file_that_changes_is_not_read_any_more(tmp_path, change):
    path = write_json(tmp_path / "a.json", [record("1", f"000 {index}") for index in range(3000)])
    records = Records(path)
    assert records[2999] == record("1", "000 2999")
    change(path)
    for index in (0, 2999):
        with pytest.raises(FileChangedError, match="the file has changed while it was in use; start again"):
            records[index]


@pytest.mark.parametrize("change", [shorten, rewrite])
def test_a_file_that_changes_while_it_is_indexed_is_refused(tmp_path, monkeypatch, change):
    path = write_json(tmp_path / "a.json", [record("1", f"000 {index}") for index in range(3000)])
    parse_sample, parsed = records_module.parse_sample, []

    def parse(value):
        parsed.append(value)
        if len(parsed) == 1000:
            change(path)
        return parse_sample(value)

    monkeypatch.setattr(records_module, "parse_sample", parse)
    monkeypatch.setattr(records_module, "WINDOW_BYTES", 4096)
    with pytest.raises(FileChangedError, match="has changed while it was in use"):
        Records(path)
    assert not (tmp_path / "a.json.index").exists()


def test_problems_are_counted_beyond_the_ones_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "MAX_PROBLEMS_KEPT", 3)
    records = Records(write_json(tmp_path / "a.json", [7] * 10))
    assert (records.num_problems, len(records.problems)) == (10, 3)


def test_the_index_is_used_again_until_the_file_changes(tmp_path, monkeypatch):
    path = write_json(tmp_path / "a.json", GOOD)
    Records(path)
    built = []
    monkeypatch.setattr(records_module, "_build_index", lambda *arguments: built.append(arguments) or 1 / 0)
    assert len(Records(path)) == 3
    write_json(path, GOOD[:2])
    with pytest.raises(ZeroDivisionError):
        Records(path)
    # The same size and time: the content's hash tells.
    write_json(path, GOOD)
    stat = path.stat()
    changed = path.read_bytes().replace(b"first", b"other")
    path.write_bytes(changed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ZeroDivisionError):
        Records(path)


@pytest.mark.parametrize("damage", [lambda old: old[:-4], lambda old: b"", lambda old: b"{}\n" + old])
def test_a_damaged_index_is_built_again(tmp_path, damage):
    path = write_json(tmp_path / "a.json", GOOD)
    Records(path)
    index_path = tmp_path / "a.json.index"
    index_path.write_bytes(damage(index_path.read_bytes()))
    assert [Records(path)[index] for index in range(3)] == GOOD


def test_the_index_goes_to_the_cache_folder_where_the_data_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_json(tmp_path / "a.json", GOOD)
    (tmp_path / "a.json.index").mkdir()  # nothing can be renamed onto a folder
    assert len(Records(path)) == 3
    (cached,) = (tmp_path / "cache" / "xcomposer-fsdp").iterdir()
    time = cached.stat().st_mtime_ns
    assert len(Records(path)) == 3
    assert cached.stat().st_mtime_ns == time


def test_records_work_where_no_index_can_be_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        records_module, "cache_paths", lambda path, suffix: [tmp_path / "a.json" / "no folder"]
    )
    records = Records(write_json(tmp_path / "a.json", GOOD))
    assert records[1] == GOOD[1]
    assert "built at every start" in caplog.text


def test_a_worker_gets_a_path(tmp_path):
    path = write_json(tmp_path / "a.json", [record("1", "2")] * 5000)
    pickled = pickle.dumps(Records(path))
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[4999] == record("1", "2")
    write_json(path, [record("1", "3")] * 5000)
    with pytest.raises(DataError, match="has changed while it was in use"):
        pickle.loads(pickled)


def test_jobs_may_build_the_index_together(tmp_path):
    path = write_json(tmp_path / "a.json", [record("1", str(index)) for index in range(3000)])
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_last, [path] * 8) == [record("1", "2999")] * 8
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.json.index"]


def _last(path):
    return Records(path)[2999]
