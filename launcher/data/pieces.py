"""SentencePiece models as fast tokenizers that encode identically, and the training of new ones.

SentencePiece (Kudo and Richardson, EMNLP 2018) segments a whole text; the `tokenizers` library does the same with its
Unigram and BPE models once four things are carried over: the normalisation, the byte fallback, the fact that special
pieces are never found in text, and, for BPE, the order among equal merges. The field meanings are those of
`sentencepiece_model.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.errors import ABSENT, DataError

SPACE = "\u2581"
"""SentencePiece writes a space so inside pieces."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType

_UNREACHABLE = -1e9
"""Score of a special or byte piece in the Unigram model: spelling its name out in known characters is always likelier.
(With a model that does not know `<`, a literal `</s>` in a text is still taken for the piece; those we train know it.)"""


def tokenizer_of_model(path: Path, *, add_cls_sep: bool = False) -> Any:
    """A `transformers` fast tokenizer with the ids of the SentencePiece model at `path`."""
    proto = parse_model(path.read_bytes())
    if proto is None or proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise DataError(str(path), ABSENT, "is not a SentencePiece unigram or BPE model", "give another tokenizer")
    return fast_tokenizer(proto, add_cls_sep=add_cls_sep)


def parse_model(serialised: bytes) -> Any:
    """The `ModelProto`, or None if these bytes are none."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # the class is made at import
    try:
        proto.ParseFromString(serialised)
    except DecodeError:
        return None
    return proto if proto.pieces else None


def fast_tokenizer(proto: Any, *, add_cls_sep: bool) -> Any:
    """From a parsed `ModelProto`. With `add_cls_sep`, `tokenizer(text)` gives `<cls> text <sep>`; else nothing is added."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(_unigram(proto) if proto.trainer_spec.model_type == _UNIGRAM else _bpe(proto))
    backend.normalizer = _normalizer(proto)
    backend.pre_tokenizer = _pre_tokenizer(proto)
    backend.decoder = _decoder(proto)
    user_defined = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type == _USER_DEFINED]
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in user_defined])
    if add_cls_sep:
        backend.post_processor = _cls_sep(proto)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # as SentencePiece: "</s>" written in a text is five characters, not the end
        model_input_names=["input_ids", "attention_mask"],
        **_special_tokens(proto),
    )


def _unigram(proto: Any) -> Any:
    from tokenizers import models

    in_text = (_NORMAL, _USER_DEFINED)
    vocabulary = [(p.piece, p.score if p.type in in_text else _UNREACHABLE) for p in proto.pieces]
    return models.Unigram(vocabulary, proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto: Any) -> Any:
    from tokenizers import models

    return models.BPE(
        vocab={p.piece: i for i, p in enumerate(proto.pieces)},
        merges=list(_merges(proto)),
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _merges(proto: Any) -> Iterator[tuple[str, str]]:
    """SentencePiece merges any two neighbours that make a piece, best score first: every split of every piece."""
    scores = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        for cut in sorted(range(1, len(piece)), key=lambda cut: _cut_order(piece, cut)):
            if piece[:cut] in scores and piece[cut:] in scores:
                yield piece[:cut], piece[cut:]


def _cut_order(piece: str, cut: int) -> tuple[int, bool]:
    """Sort key that keeps SentencePiece's "leftmost first" among the splits of one piece.

    Two splits compete for a symbol only when they mirror each other: s1 s2 s3 with piece = s1 s2 = s2 s3. The one on
    the left must then rank first. If s1 is the shorter, that is the shorter-left split; where either may stand left
    (`aaa` as a + aa or aa + a), a run was merged from its left and the single symbol is at its right end.
    """
    longer = max(cut, len(piece) - cut)
    shorter = len(piece) - longer
    is_shorter_first = piece[:longer] == piece[shorter:] and piece[longer:] != piece[:shorter]
    return -longer, (cut == longer) == is_shorter_first


def _normalizer(proto: Any) -> Any:
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _pre_tokenizer(proto: Any) -> Any:
    """Cut before each space that follows something else, and around newlines, where no piece reaches across.

    The segmentation is the same with and without; pieces of a text that come again are then found in a cache.
    """
    from tokenizers import Regex, pre_tokenizers

    pieces = [p.piece for p in proto.pieces if p.type == _NORMAL]
    if any(SPACE in piece.lstrip(SPACE) for piece in pieces):
        return None
    # without byte fallback a newline may be unknown, and unknown characters side by side are one token
    is_newline_alone = proto.trainer_spec.byte_fallback and not any(
        "\n" in piece and len(piece) > 1 for piece in pieces
    )
    word = rf"{SPACE}*[^{SPACE}\n]+|{SPACE}+|\n" if is_newline_alone else rf"{SPACE}*[^{SPACE}]+|{SPACE}+"
    return pre_tokenizers.Split(Regex(word), behavior="isolated")


def _decoder(proto: Any) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _cls_sep(proto: Any) -> Any:
    """BERT's template, with the pieces <cls> and <sep>."""
    from tokenizers import processors

    ids = {p.piece: i for i, p in enumerate(proto.pieces)}
    return processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[("<cls>", ids["<cls>"]), ("<sep>", ids["<sep>"])],
    )


def _special_tokens(proto: Any) -> dict[str, str]:
    spec = proto.trainer_spec
    named = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    tokens = {name: proto.pieces[i].piece for name, i in named.items() if 0 <= i < len(proto.pieces)}
    control = {p.piece for p in proto.pieces if p.type == _CONTROL}
    return {**tokens, **{f"{name}_token": f"<{name}>" for name in ("cls", "sep", "mask") if f"<{name}>" in control}}
