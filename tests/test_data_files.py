"""Files that are replaced in one step: their permissions, and what is left where that fails."""

import os

import pytest

from data.files import cache_paths, replace_file, write_cache


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_a_replaced_file_has_the_permissions_of_any_new_file_and_a_cache_is_readable_by_all(tmp_path, umask):
    before = os.umask(umask)
    try:
        replace_file(tmp_path / "run.json", b"{", b"}")
        assert write_cache(cache_paths(tmp_path / "a.json", ".index"), b"index")
    finally:
        os.umask(before)
    assert (tmp_path / "run.json").read_bytes() == b"{}"
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "a.json.index").stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    replace_file(tmp_path / "run.json", b"old")
    with pytest.raises(TypeError):
        replace_file(tmp_path / "run.json", b"new", "no bytes")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == b"old"
