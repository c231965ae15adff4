"""`python -m data.preview`, looked at in a real browser: what a person would look for is there."""

import base64
import html
import io
import re
import shutil
import subprocess

import pytest
from PIL import Image

from data.preview import _tokens, main
from tests.data_fixtures import record, write_json
from tests.tiny import tiny_data, tiny_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    tiny_data(folder)
    attack = record("say </script><b>w1</b>", "w1 & w2", record_id="attack")
    tail = record("w1", " ".join(["w2"] * 300), record_id="tail")
    write_json(folder / "odd.json", [attack, record("w1 " * 300, "w2", record_id="long"), tail])
    with (folder / "data.txt").open("a") as file:
        file.write("odd.json\n")
    arguments = [str(folder / "data.txt"), "--model_name_or_path", str(tiny_model(folder / "model"))]
    arguments += ["--max_length", "256"]
    assert main([*arguments, "--num_samples", "40", "--out", str(folder / "packed.html")]) == 0
    rows = ["--num_samples", "5", "--packing", "False", "--out", str(folder / "rows.html")]
    assert main([*arguments, *rows]) == 0
    return folder


def browse(folder, page):
    """The page as it is after its script has run."""
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, "--dump-dom", f"file://{folder}/{page}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return result.stdout


def articles(dom):
    """(attributes, content) of each sample on the page."""
    return re.findall(r"<article([^>]*)>(.*?)</article>", dom, re.DOTALL)


def test_a_person_finds_rows_pictures_roles_and_labels(folder):
    dom = browse(folder, "packed.html")
    assert "32 samples shown" in dom
    samples = articles(dom)
    assert len(samples) == 32
    rows = re.findall(r"packed row \d+ <small>(\d+) samples, (\d+) of at most 256 tokens", dom)
    assert sum(int(count) for count, _ in rows) == 32
    assert all(int(tokens) <= 256 for _, tokens in rows)
    assert len(rows) < 32
    (colour,) = [
        content for _, content in samples if "&#x27;colour-4&#x27;" in content or "'colour-4'" in content
    ]
    assert colour.count("<img") == 1
    assert "image: 25 slots" in colour
    text = re.sub(r"<[^>]+>", "", colour)
    assert "[UNUSED_TOKEN_146]user⏎\nimage: 25 slotswhat colour is it?[UNUSED_TOKEN_145]⏎" in text
    trained = re.findall(r'<i class="([^"]*)trained"[^>]*>([^<]*)</i>', colour)
    assert html.unescape("".join(token for _, token in trained)) == "it is green.[UNUSED_TOKEN_145]</s>"
    assert {style.strip() for style, _ in trained} == {"assistant", "control"}
    assert '<i class="user"' in colour


def test_the_menu_shows_one_source_alone(folder):
    samples = articles(browse(folder, "packed.html#source=both"))
    visible = [attributes for attributes, _ in samples if "hidden" not in attributes]
    assert len(visible) == 6
    assert all('data-source="both"' in attributes for attributes in visible)
    assert "6 samples shown" in browse(folder, "packed.html#source=both")


def test_rows_without_packing(folder):
    dom = browse(folder, "rows.html")
    assert "packed row" not in dom
    assert len(articles(dom)) == 5


def test_text_of_the_data_is_only_text(folder):
    dom = browse(folder, "packed.html")
    (attack,) = [content for _, content in articles(dom) if "'attack'" in content]
    assert "<b>" not in attack
    assert "</script><b>w1</b>" not in attack
    assert dom.count("<script>") == 1


def test_the_page_is_complete_in_itself(folder):
    page = (folder / "packed.html").read_text(encoding="utf-8")
    assert "http" not in page
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]+)"', page))
    assert "record 1 (id &#x27;long&#x27;) keeps no answer token" in page


def test_a_sample_that_loses_its_tail_is_marked(folder):
    page = (folder / "packed.html").read_text(encoding="utf-8")
    (tail,) = [content for _, content in articles(page) if "&#x27;tail&#x27;" in content]
    (whole,) = re.findall(r"cut at max_length: 256 of (\d+) tokens", page)
    assert f"cut at max_length: 256 of {whole} tokens" in tail
    assert int(whole) == 600 + 11, "words and spaces, and what is around them"


class ByteTokenizer:
    """A few control tokens, and the bytes of all text."""

    bos_token, eos_token = "<s>", "</s>"

    def convert_tokens_to_ids(self, tokens):
        return [-1] * len(tokens)

    def convert_ids_to_tokens(self, token):
        return f"<0x{token:02X}>" if token < 256 else "▁cat"


def test_characters_that_are_several_byte_tokens_can_be_read():
    ids = [*"浦é<\n".encode(), 0xE6, 300, 0xB5]
    marked = list(_tokens(ByteTokenizer(), ids, ids, [False] * len(ids), ["user"] * len(ids)))
    texts = [html.unescape(re.sub(r"<[^>]+>", "", token)) for token in marked]
    assert texts[:6] == ["<0xE6>", "<0xB5>", "<0xA6>", "浦", "<0xC3>", "<0xA9>"]
    assert texts[6:10] == ["é", "<0x3C>", "<", "⏎\n"]
    assert texts[10:12] == ["<0xE6>", " cat"], "half a character is not taken together with what follows"
    assert "&lt;</i>" in marked[8]


def test_pictures_are_those_that_the_model_gets(folder):
    page = (folder / "packed.html").read_text(encoding="utf-8")
    for _, content in articles(page):
        if "colour-4&#x27;" in content:
            data = re.search(r"base64,([^\"]+)", content)
            image = Image.open(io.BytesIO(base64.b64decode(data[1])))
            assert image.size == (70, 70)
            red, green, blue = image.getpixel((35, 35))
            assert (red, green, blue) == pytest.approx((30, 200, 40), abs=6)
            return
    pytest.fail("colour-4 is not on the page")


def test_what_cannot_be_previewed_is_a_sentence(tmp_path, capsys):
    (tmp_path / "data.txt").write_text("")
    assert main([str(tmp_path / "data.txt"), "--model_name_or_path", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
