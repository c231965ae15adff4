"""The README names only what exists: files, flags, modules."""

import importlib.util
import re
from dataclasses import fields

from tests.tiny import ROOT
from trainer.config import Config
from trainer.generate import Questions

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_file_of_the_tree_exists_and_every_module_is_in_it():
    tree = README.split("## The files")[1].split("```")[1]
    folder, named = "", set()
    for line in tree.strip().splitlines():
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


def test_every_module_that_is_run_exists():
    for module in set(re.findall(r"-m ((?:trainer|data|tests)(?:\.\w+)+)", README)):
        assert importlib.util.find_spec(module), module


def test_every_flag_exists():
    known = {field.name for kind in (Config, Questions) for field in fields(kind)} | {"help", "config"}
    known |= {"merge", "modernise", "adapter", "checkpoint"}  # of export
    known |= {"out", "epochs", "high_resolution"}  # of preview, of the demo
    known |= {"workloads", "peers", "rounds", "dtype", "steps", "ranks", "ours"}  # of compare
    torchrun = {"nproc_per_node", "signals-to-handle", "shutdown-timeout", "max-restarts"}
    slurm = {"signal", "requeue", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"}
    slurm |= {"open-mode", "output"}
    used = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README))
    assert used - known - torchrun - slurm == set()


def test_every_link_leads_to_a_file():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
