"""Shows the model's inputs: `python -m data.preview data.txt --model_name_or_path DIR --out preview.html`.

Writes one page, usable offline, with the first samples of the training order from the training's own loader:
rows as they are packed, pictures as the model sees them, tokens coloured by role and by whether they are
trained. A menu selects one source; `preview.html#source=pets` opens with that selection.
"""

import codecs
import html
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.batch import MicroBatch
from data.errors import DataError
from data.images import jpeg_uri
from data.lengths import measure_lengths
from data.loader import SampleReader, StepLoader
from data.packing import CostModel, Packing
from data.reader import CommandConfig, open_data, parse_command
from data.sampler import StepSampler
from data.tokens import IGNORED

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70em; padding: 0 1em; color: #222; }}
header {{ position: sticky; top: 0; background: #fff; padding: .6em 0; border-bottom: 1px solid #ccc; }}
h1 {{ font-size: 1.2em; margin: 0; }} h2 {{ font-size: 1em; margin: 2em 0 .3em; border-top: 4px solid #444; }}
article {{ border-left: 4px solid #bbb; margin: .8em 0; padding: .2em .9em; }}
h3 {{ font-size: .95em; margin: 0; }} small {{ color: #666; font-weight: normal; }}
p {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .4em 0; font-family: ui-monospace, monospace; }}
i {{ font-style: normal; border-radius: 2px; box-shadow: inset -1px 0 #fff; }}
.user {{ background: #dce9fb; }} .assistant {{ background: #e4e4e4; }} .system {{ background: #efe0f7; }}
.control {{ background: #f7e3c8; color: #875; }} .slots {{ background: #333; color: #fff; padding: 0 .4em; }}
.text {{ color: #a00; font-weight: bold; }}
.trained {{ background: #bfe8bf; border-bottom: 2px solid #2a7d2a; }}
img {{ max-height: 14em; max-width: 100%; margin: .3em .5em 0 0; border: 1px solid #ccc; }}
[hidden] {{ display: none; }}
</style></head><body>
<header><h1>{title}</h1>
<label>source <select id="source"><option value="">all</option>{options}</select></label>
<span id="shown"></span> ·
<i class="user">user</i> <i class="assistant">assistant</i> <i class="system">system</i>
<i class="control">control token</i> <i class="trained">trained</i> <i class="slots">image slots</i>
<i class="text">text of byte tokens</i></header>
{body}
<script>
const menu = document.getElementById("source");
function show() {{
  let shown = 0;
  for (const row of document.querySelectorAll("section")) {{
    let any = false;
    for (const sample of row.querySelectorAll("article")) {{
      sample.hidden = menu.value !== "" && sample.dataset.source !== menu.value;
      if (!sample.hidden) {{ shown += 1; any = true; }}
    }}
    row.hidden = !any && row.dataset.samples !== "0";
  }}
  document.getElementById("shown").textContent = shown + " samples shown";
}}
menu.onchange = show;
const chosen = new URLSearchParams(location.hash.slice(1)).get("source");
if (chosen !== null) menu.value = chosen;
show();
</script></body></html>
"""


@dataclass
class PreviewConfig(CommandConfig):
    """Preview the model's inputs: `python -m data.preview data.txt --model_name_or_path DIR`."""

    # --- the command ---------------------------------------------------------------------------------
    num_samples: int = 32
    """Samples on the page, the first of the training order."""
    out: str = "preview.html"
    """File to write the page to."""

    def problems(self) -> list[str]:
        return super().problems() + self.too_small(num_samples=1)


def preview(reader: SampleReader, cost: CostModel, config: PreviewConfig) -> str:
    """The page, with the first samples of the training order."""
    sampler = StepSampler(reader.sources, config.seed, global_batch=config.num_samples)
    packing = None
    if config.packing:
        packing = Packing(measure_lengths(reader, num_workers=config.num_workers), config.row_tokens, cost)
    loader = StepLoader(
        reader,
        sampler,
        rank=0,
        num_ranks=1,
        samples_per_micro_batch=1,
        num_steps=1,
        on_bad_sample="skip",
        packing=packing,
    )
    (batches,) = list(loader)
    room = packing.max_tokens if packing else reader.encoder.max_length
    body = "\n".join(_row(reader, batch, number, room) for number, batch in enumerate(batches))
    left_out = [why for batch in batches for _, why in (*batch.skipped, *batch.unsupervised)]
    if left_out:
        body += "<h2>left out</h2>" + "".join(f"<p>{html.escape(why)}</p>" for why in left_out)
    options = "".join(f"<option>{html.escape(source.name)}</option>" for source in reader.sources)
    return PAGE.format(title=f"{sum(b.num_samples for b in batches)} samples", options=options, body=body)


def _row(reader: SampleReader, batch: MicroBatch, number: int, room: int) -> str:
    """A row of at most `room` tokens as HTML: for each sample its record, pictures and tokens."""
    kind = "row" if batch.inputs["position_ids"] is None else "packed row"
    title = f"{kind} {number} <small>{batch.num_samples} samples, {batch.num_tokens:,} of at most "
    title += f"{room:,} tokens, {batch.num_supervised:,} trained</small>"
    articles = []
    begin = 0
    for source_number, index in batch.sample_ids:
        source = reader.sources[source_number]
        encoded, _ = reader.read(source_number, index, decode=False)
        span = slice(begin, begin := begin + len(encoded.input_ids))
        ids, labels, slots = (
            batch.inputs[name][0, span].tolist() for name in ("input_ids", "labels", "im_mask")
        )
        numbers = f"{len(ids):,} tokens, {sum(slots):,} image slots, {encoded.num_supervised:,} trained"
        if encoded.is_cut:
            whole = reader.tokens_before_cut(source_number, index, encoded)
            numbers += f"; <b>cut at max_length: {len(ids):,} of {whole:,} tokens</b>"
        images = "".join(map(_picture, reader.views(source_number, index, encoded)))
        owners: list[str] = []  # of each token: the role of its text, or its image
        numbered = enumerate(encoded.image_tokens)
        for piece in reader.encoder.pieces(source.sample(index)):
            if piece.ids is not None:
                owners += [piece.role] * len(piece.ids)
            elif (image := next(numbered, None)) is not None:
                owners += [f"control image-{image[0]}"] * image[1]
        tokens = "".join(_tokens(reader.encoder.tokenizer, ids, labels, slots, owners))
        name, where = html.escape(source.name), html.escape(source.where(index))
        articles.append(
            f'<article data-source="{name}"><h3>{name} <small>{where}: {numbers}</small></h3>'
            f"{images}<p>{tokens}</p></article>"
        )
    return f'<section data-samples="{len(articles)}"><h2>{title}</h2>{"".join(articles)}</section>'


def _tokens(
    tokenizer: Any,
    ids: list[int],
    labels: list[int],
    slots: list[bool],
    owners: list[str],
) -> Iterator[str]:
    """Each token as HTML, and slots of an image in a row as one; a character of several byte tokens follows
    them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    at = 0
    while at < len(ids):
        if slots[at]:
            end = at
            while end < len(ids) and slots[end] and owners[end] == owners[at]:
                end += 1
            yield f'<i class="slots">image: {end - at:,} slots</i>'
            at = end
            decoder.reset()
            continue
        token = tokenizer.convert_ids_to_tokens(ids[at]).replace("▁", " ").replace("<0x0A>", "\n")
        byte = BYTE_TOKEN.fullmatch(token)
        if not byte:
            decoder.reset()
        style = owners[at] + (" trained" if labels[at] != IGNORED else "")
        text = html.escape(token).replace("\n", "⏎\n")
        yield f'<i class="{style}" title="{ids[at]}">{text}</i>'
        if byte and (character := decoder.decode(bytes.fromhex(byte[1]))):
            yield f'<i class="text">{html.escape(character)}</i>'
        at += 1


def _picture(image: Image.Image) -> str:
    """The picture as HTML."""
    return f'<img alt="{image.width}×{image.height}" src="{jpeg_uri(image, quality=90)}">'


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_command(PreviewConfig, argv, "data.preview")
    if config is None:
        return 2
    try:
        page = preview(*open_data(config), config)
        Path(config.out).write_text(page, encoding="utf-8")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"the page is {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
