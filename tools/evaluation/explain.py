"""Why a model answers as it does: attention of each layer and head, and what each token contributed (`fleetune explain`).

    fleetune explain MODEL --text "a fine film" --out why

Attributions are integrated gradients (Sundararajan et al. 2017) by captum, along the straight line from the embedding of
padding to that of the text: they sum to the difference of the answer's log-probability between the two (completeness),
and the page says how far they are from it. For a classifier the answer is a class, for a GPT the next token, for a masked
model the token at `[MASK]`. Attention says where a head looked, not why the answer came out so.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from launcher.data.tokenizer import TokenizerSource, load_tokenizer
from launcher.errors import ABSENT, EXIT_DONE, DataError, ModelError, UserError
from launcher.task import MODEL_INPUTS
from launcher.train.engine import model_inputs
from tools.evaluation.opened import Opened, find, opened

STEPS = 64  # of the integral: the page says what they leave out
MOST_TOKENS = 128  # that a map of attention can still show
HEADS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
}
_INSTALL = "pip install 'fleetune[explain]'"


@dataclass(frozen=True)
class Explanation:
    tokens: list[str]
    answer: str
    probability: float
    attributions: NDArray[np.float64]
    """(tokens,), in nats of the answer's log-probability."""
    missing: float
    """What the attributions lack of the difference that they should sum to."""
    attention: NDArray[np.float64]
    """(layers, heads, tokens, tokens): each row sums to 1."""


def explain(model: Opened, tokenizer: Any, text: str, target: str | None = None) -> Explanation:
    """target: a label, or a token; None takes the likeliest. Raises UserError."""
    encoded = tokenizer(text, return_tensors="pt")
    num_tokens = int(encoded["input_ids"].shape[1])
    if not 1 <= num_tokens <= MOST_TOKENS:
        rule = f"is {num_tokens} tokens, where between 1 and {MOST_TOKENS} can be shown"
        raise DataError("--text", ABSENT, rule, "give a shorter text")
    module = model.modules[0]
    batch = {name: encoded[name].to(model.device) for name in MODEL_INPUTS if name in encoded}
    inputs = model_inputs(batch, module.config)
    place = _place(module, tokenizer, inputs["input_ids"][0])
    with torch.inference_mode():
        output = module(**inputs, output_attentions=True)
    logits = _answer_logits(output.logits, place)[0]
    if not bool(logits.isfinite().all()):
        raise ModelError(
            "MODEL", model.name, "gives logits that are not finite (NaN)", "look at the end of its training"
        )
    wanted = int(logits.argmax()) if target is None else _wanted(module, tokenizer, target, place is None)
    attributions, missing = _integrated(module, inputs, place, wanted, model.pad_id)
    name = module.config.id2label[wanted] if place is None else tokenizer.decode([wanted])
    return Explanation(
        tokens=tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist()),
        answer=str(name),
        probability=float(logits.float().softmax(-1)[wanted]),
        attributions=attributions,
        missing=missing,
        attention=torch.stack([layer[0] for layer in output.attentions]).double().cpu().numpy(),
    )


def _place(module: Any, tokenizer: Any, ids: Tensor) -> int | None:
    """Where the answer is given: None for a head that answers once."""
    kind = type(module).__name__
    if kind.endswith("ForSequenceClassification"):
        return None
    if not kind.endswith("ForMaskedLM"):
        return len(ids) - 1
    masks = (ids == tokenizer.mask_token_id).nonzero().flatten().tolist()
    if len(masks) != 1:
        rule = f"holds {len(masks)} times {tokenizer.mask_token}, where a masked language model needs one"
        raise DataError("--text", ABSENT, rule, "hide one word with it")
    return int(masks[0])


def _answer_logits(logits: Tensor, place: int | None) -> Tensor:
    return logits if place is None else logits[:, place]


def _wanted(module: Any, tokenizer: Any, target: str, is_label: bool) -> int:
    if is_label:
        ids = {str(name): int(i) for i, name in module.config.id2label.items()}
        if target not in ids:
            rule = f"is not a label of the model, which knows {', '.join(ids)}"
            raise DataError("--target", target, rule, "give one of these")
        return ids[target]
    found = tokenizer(target, add_special_tokens=False)["input_ids"]
    if len(found) != 1:
        raise DataError("--target", target, f"is {len(found)} tokens, not one", "give one token")
    return int(found[0])


def _integrated(
    module: Any, inputs: dict[str, Tensor], place: int | None, wanted: int, pad_id: int
) -> tuple[NDArray[np.float64], float]:
    """captum walks in the space of embeddings; the frame of the text (`[CLS]`, `[SEP]`) stays in the baseline."""
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise UserError("explain", ABSENT, "needs captum", _INSTALL) from None
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    embed = module.get_input_embeddings()
    ids = inputs["input_ids"]
    with torch.no_grad():
        start, blank = embed(ids), embed(torch.full_like(ids, pad_id))

    def answer(embeddings: Tensor) -> Tensor:
        more = {name: value.expand(len(embeddings), *value.shape[1:]) for name, value in rest.items()}
        logits = _answer_logits(module(inputs_embeds=embeddings, **more).logits, place)
        return logits.float().log_softmax(-1)[:, wanted]

    method = IntegratedGradients(answer)
    found, delta = method.attribute(
        start, baselines=blank, n_steps=STEPS, internal_batch_size=16, return_convergence_delta=True
    )
    return found.sum(-1)[0].double().cpu().numpy(), float(delta.abs().max())


def write(explanation: Explanation, folder: Path, title: str) -> list[Path]:
    """`explain.html`, which needs no other file, and its pictures: `tokens.png`, `attention.png`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("explain", ABSENT, "needs matplotlib to draw", _INSTALL) from None
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [folder / "tokens.png", folder / "attention.png"]
    _draw_tokens(Figure, explanation, pictures[0])
    _draw_attention(Figure, explanation, pictures[1])
    page = folder / "explain.html"
    page.write_text(_page(explanation, title, pictures), encoding="utf-8")
    return [page, *pictures]


def _draw_tokens(figure_class: Any, explanation: Explanation, path: Path) -> None:
    values, count = explanation.attributions, len(explanation.tokens)
    figure = figure_class(figsize=(6, 0.9 + 0.22 * count), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(count), values, color=np.where(values >= 0, "#2a6f97", "#c1553b"))
    axes.set_yticks(range(count), _plain(explanation.tokens), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set(
        xlabel="nats towards the answer", title=f"{_plain([explanation.answer])[0]}, p = {explanation.probability:.3g}"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _draw_attention(figure_class: Any, explanation: Explanation, path: Path) -> None:
    """A small map for every layer (down) and head (across), on one scale; tokens as on the other picture."""
    layers, heads, count, _ = explanation.attention.shape
    side = 1.1 if heads > 4 or count < 12 else 1.8
    figure = figure_class(figsize=(side * heads + 0.8, side * layers + 0.8), layout="constrained")
    grid = figure.subplots(layers, heads, squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            axes = grid[layer, head]
            shown = axes.imshow(explanation.attention[layer, head], vmin=0, vmax=1, cmap="viridis")
            axes.set(xticks=[], yticks=[])
            if layer == 0:
                axes.set_title(f"head {head}", fontsize=8)
            if head == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=8)
    figure.colorbar(shown, ax=grid, shrink=0.6, label="share of attention (row looks at column)")
    figure.savefig(path, dpi=110)


def _plain(tokens: list[str]) -> list[str]:
    """matplotlib would read a dollar as mathematics."""
    return [token.replace("$", r"\$") for token in tokens]


def _page(explanation: Explanation, title: str, pictures: list[Path]) -> str:
    largest = max(float(np.abs(explanation.attributions).max()), 1e-12)
    marked = " ".join(
        f'<span style="background:{_colour(value / largest)}" title="{value:+.3f}">{html.escape(token)}</span>'
        for token, value in zip(explanation.tokens, explanation.attributions, strict=True)
    )
    images = "".join(
        f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    )
    total = float(explanation.attributions.sum())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c1c1c; background: #fff }}
span {{ padding: .1rem .25rem; border-radius: .2rem; color: #111 }} img {{ display: block; max-width: 100%; margin: 1rem 0 }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<p>Answer: <b>{html.escape(explanation.answer)}</b>, probability {explanation.probability:.3g}.</p>
<p>{marked}</p>
<p>Blue speaks for the answer, red against it: integrated gradients from padding to the text, {total:+.3f} nats in all
({explanation.missing:.2g} short of what {STEPS} steps should sum to). Below them, where each head looks; that is no reason.</p>
{images}
</body></html>
"""


def _colour(share: float) -> str:
    red, green, blue = (42, 111, 151) if share >= 0 else (193, 85, 59)
    return f"rgba({red},{green},{blue},{0.1 + 0.7 * abs(share):.2f})"


def _head(folder: Path, name: str) -> str:
    from launcher.cost.architecture import config_of_folder

    architectures = config_of_folder(str(folder), {}, where="MODEL").architectures or ["a model without a head"]
    for suffix, head in HEADS.items():
        if architectures[0].endswith(suffix):
            return head
    rule = f"is a {architectures[0]}, which gives no answer that can be explained"
    raise ModelError("MODEL", name, rule, "give a classifier, a GPT or a masked language model")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="fleetune explain", description=str(__doc__).partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="as for `fleetune eval`")
    parser.add_argument("--text", required=True, help="what the model reads")
    parser.add_argument("--target", help="a label or token; default: the likeliest")
    parser.add_argument("--out", type=Path, default=Path("explain"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        place = find(options.model)
        model = opened([place], _head(place.folder, options.model), "explaining")
        for module in model.modules:
            module.set_attn_implementation("eager")  # the fused ones keep no weights
        tokenizer = load_tokenizer(TokenizerSource("MODEL", str(place.folder)))
        explanation = explain(model, tokenizer, options.text, options.target)
        files = write(explanation, options.out, f"{options.model}: {options.text}")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    order = np.argsort(-np.abs(explanation.attributions))[:8]
    sys.stdout.write(f"{explanation.answer}, probability {explanation.probability:.3g}\n")
    for i in sorted(order):
        sys.stdout.write(f"  {explanation.tokens[i]:<20} {explanation.attributions[i]:+.4f}\n")
    sys.stdout.write(f"wrote {', '.join(map(str, files))}\n")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
