"""data.txt: what its lines mean, and how they are refused."""

import pytest

from data.errors import DataError
from data.mixture import read_mixture
from tests.data_fixtures import record, write_json


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my files").mkdir()
    for name in ("a.json", "my files/b c.json", "it's.json", 'say "hi".json', "odd#name.json"):
        write_json(tmp_path / name, [record("1", "2")] * 50)
    return tmp_path


def mixture(folder, text, **options):
    (folder / "data.txt").write_text(text)
    return read_mixture(folder / "data.txt", **options)


@pytest.mark.parametrize(
    ("line", "name", "num_samples"),
    [
        ("a.json 0.02", "a", 20),
        ("a.json\t0.02", "a", 20),
        ("  a.json   1.5  ", "a", 1500),
        ("a.json 0.0015", "a", 2),
        ("a.json 2e-3", "a", 2),
        ("a.json", "a", 50),
        ("./a.json 0.057  # thousands", "a", 57),
        ("my files/b c.json 0.02", "b c", 20),
        ('"my files/b c.json" 0.02', "b c", 20),
        ("'my files/b c.json'", "b c", 50),
        ("it's.json 0.02", "it's", 20),
        ('say "hi".json 0.02', 'say "hi"', 20),
        ('"it\'s.json" 0.02 # quoted', "it's", 20),
        ("odd#name.json 0.02", "odd#name", 20),
    ],
)
def test_a_line_names_a_file_and_thousands_of_samples(folder, line, name, num_samples):
    (source,) = mixture(folder, f"# comment\n\n{line}\r\n   # another\n")
    assert (source.name, source.num_samples, len(source.records)) == (name, num_samples, 50)


def test_a_ratio_of_the_file(folder):
    sources = mixture(folder, "a.json 0.5\nit's.json 2\nodd#name.json\n", given_num=False)
    assert [source.num_samples for source in sources] == [25, 100, 50]


def test_a_file_that_is_repeated_often_says_so(folder):
    write_json(folder / "one.json", [record("1", "2")])
    often, usual = mixture(folder, "one.json 1\na.json 0.5\n")
    assert usual.repetition is None
    assert "one.json: 1,000 samples an epoch of 1 record, each about 1,000 times" in often.repetition
    (often,) = mixture(folder, "a.json 12\n", given_num=False)
    assert "600 samples an epoch of 50 records, each about 12 times" in often.repetition


def test_a_json_file_stands_in(folder):
    (source,) = read_mixture(folder / "a.json")
    assert (source.name, source.num_samples, source.image_root) == ("a", 50, folder)
    assert read_mixture(folder / "a.json", image_root="/pictures")[0].sample(0).turns[1] == ("assistant", "2")


def test_names_stay_unique(folder):
    write_json(folder / "my files/a.json", [record("1", "2")])
    names = [source.name for source in mixture(folder, "a.json 1\na.json 2\nmy files/a.json\n")]
    assert len(set(names)) == 3
    assert all("a.json" in name for name in names)


def test_every_problem_is_reported_at_once(folder):
    write_json(folder / "bad.json", [record("1", "2"), {"id": "x9", "conversations": []}, record("1")])
    (folder / "broken.json").write_text('[{"a": 1}, {"a": ]')
    (folder / "empty.json").write_text("")
    with pytest.raises(DataError) as caught:
        mixture(
            folder, "nowhere.json 1\na.json 0\na.json -1\na.json nan\nbad.json\nbroken.json\nempty.json\n"
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 8
    for line, parts in zip(
        lines,
        [
            ("line 1", "nowhere.json", "No such file"),
            ("line 2", "0 thousands of samples is no sample"),
            ("line 3", "'-1'"),
            ("line 4", "'nan'"),
            ("bad.json: record 1 (id 'x9')", "'conversations'"),
            ("bad.json: record 2", "no assistant turn"),
            ("line 6", "broken.json", "record 1", "line 1"),
            ("line 7", "empty.json", "empty"),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts), line


def test_bad_records_may_be_left_to_the_loader(folder):
    write_json(folder / "bad.json", [record("1", "2"), {"id": "x9"}])
    assert mixture(folder, "bad.json", skip_bad=True)[0].num_samples == 2


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "   \n"])
def test_an_empty_data_txt_is_refused(folder, text):
    with pytest.raises(DataError, match="names no file"):
        mixture(folder, text)


def test_a_path_with_a_null_byte_is_refused(folder):
    with pytest.raises(DataError, match="cannot be read"):
        mixture(folder, "one\0.json 0.1")


def test_what_is_no_data_txt_is_refused(folder):
    with pytest.raises(DataError, match="cannot be read"):
        read_mixture(folder / "absent.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_mixture(folder)
    (folder / "data.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a text file"):
        read_mixture(folder / "data.txt")
