"""The READMEs name only files, flags and modules that exist, and the same ones in both languages."""

import importlib.util
import re
from dataclasses import fields

import pytest

from tests.tiny import ROOT
from trainer.config import Config
from trainer.forecast.config import ForecastConfig
from trainer.generate import Questions

ENGLISH, CHINESE, BENCHMARKS = "README.md", "README_zh-CN.md", "tests/benchmarks/README.md"
CODE, CHINESE_CODE = "trainer/README.md", "trainer/README_zh-CN.md"
in_both = pytest.mark.parametrize("name", [ENGLISH, CHINESE])
in_all = pytest.mark.parametrize("name", [ENGLISH, CHINESE, BENCHMARKS, CODE, CHINESE_CODE])
of_translations = pytest.mark.parametrize(("english", "chinese"), [(ENGLISH, CHINESE), (CODE, CHINESE_CODE)])


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block; the language of the file tree is empty."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(name), re.DOTALL | re.MULTILINE)


def tree(name: str) -> str:
    (found,) = [text for language, text in blocks(name) if not language]
    return found


def without_comments(language: str, text: str) -> list[str]:
    """The lines of a block; in the file tree, what stands behind two spaces is a comment."""
    comment = r"\s+#(?!SBATCH|!).*" if language else r"(?<=\S)\s{2,}.*"
    return [re.sub(comment, "", line).rstrip() for line in text.splitlines()]


def code_spans(name: str) -> set[str]:
    prose = re.sub(r"^```.*?^```$", "", read(name), flags=re.DOTALL | re.MULTILINE)
    return {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)}


@pytest.mark.parametrize("name", [CODE, CHINESE_CODE])
def test_every_file_of_the_tree_exists_and_every_module_is_in_it(name):
    folder, named = "", set()
    for line in tree(name).strip().splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
            continue
        names = re.findall(r"[\w.]+(?:\.py|/)", re.split(r"\s{2,}", line.strip())[0])
        named |= {f"{folder}{name}" for name in names}
    assert named
    assert all((ROOT / name).exists() for name in named), named
    modules = {
        f"{folder}/{path.name}" for folder in ("trainer", "data") for path in (ROOT / folder).glob("*.py")
    }
    assert modules - named <= {"trainer/__init__.py", "data/__init__.py", "data/errors.py"}


@in_all
def test_every_module_that_is_run_exists(name):
    for module in set(re.findall(r"-m ((?:trainer|data|tests)(?:\.[a-z]\w*)+)", read(name))):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("name", [ENGLISH, CHINESE, BENCHMARKS])
def test_every_flag_exists(name):
    known = {field.name for kind in (Config, ForecastConfig, Questions) for field in fields(kind)}
    known |= {"help", "config"}
    known |= {"merge", "modernise", "adapter", "checkpoint"}  # of export
    known |= {"out", "epochs", "high_resolution", "family", "tiny"}  # of commands
    known |= {"workloads", "peers", "rounds", "dtype", "steps", "ranks", "ours"}  # of compare
    known |= {
        "enable-lora",
        "max-lora-rank",
        "lora-modules",
        "model",
        "model_args",
        "tasks",
    }  # of vLLM, lmms-eval
    torchrun = {"nproc_per_node", "signals-to-handle", "shutdown-timeout", "max-restarts"}
    slurm = {"signal", "requeue", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"}
    slurm |= {"open-mode", "output"}
    used = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", read(name)))
    assert used
    assert used - known - torchrun - slurm == set()


@in_all
def test_every_link_leads_to_a_file(name):
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", read(name))
    assert targets
    for target in targets:
        assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", [CODE, CHINESE_CODE])
def test_every_source_file_in_the_text_exists(name):
    files = {span for span in code_spans(name) if re.fullmatch(r"(?:trainer|data|tests)/[\w/.-]+", span)}
    assert files
    assert all((ROOT / file).exists() for file in files), files


@of_translations
def test_the_two_languages_link_to_each_other_in_the_first_line(english, chinese):
    assert "](README_zh-CN.md)" in read(english).splitlines()[0]
    assert "](README.md)" in read(chinese).splitlines()[0]


def test_the_readme_links_to_the_benchmarks_and_the_code():
    for name, code in ((ENGLISH, CODE), (CHINESE, CHINESE_CODE)):
        assert f"]({BENCHMARKS})" in read(name), name
        assert f"]({code})" in read(name), name


@of_translations
def test_both_languages_have_the_same_code_blocks_apart_from_comments(english, chinese):
    expected = [(language, without_comments(language, text)) for language, text in blocks(english)]
    assert expected
    assert [(language, without_comments(language, text)) for language, text in blocks(chinese)] == expected


@of_translations
def test_both_languages_name_the_same_commands_flags_and_files_in_the_text(english, chinese):
    assert code_spans(english) - code_spans(chinese) == set()
    assert code_spans(chinese) - code_spans(english) == set()


def test_both_languages_give_the_same_figures():
    """Percentages, sizes in MB and GB, and ratios."""
    pattern = r"\d[\d,.]*(?= ?(?:%|GB\b|MB\b|×))"
    figures = [re.findall(pattern, read(name)) for name in (ENGLISH, CHINESE)]
    assert figures[0]
    assert sorted(figures[0]) == sorted(figures[1])


def test_the_readme_is_short_enough_to_be_read_from_top_to_bottom():
    assert len(read(ENGLISH).splitlines()) <= 300
