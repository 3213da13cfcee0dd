"""What is said about a model: equal to plain loops and to the libraries, sure of itself as often as it says, never silent."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import log_loss, roc_auc_score
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification

from launcher.errors import DataError, ModelError
from tests.unit.small_models import SIZES, WORDS, printed, refusal, rows_of, scored, small_models
from tools.evaluate import main
from tools.evaluation.batches import Budget, batches
from tools.evaluation.batches import scored as in_memory
from tools.evaluation.calibration import ece_of, reliability
from tools.evaluation.compare import differences, mcnemar
from tools.evaluation.generation import last_number
from tools.evaluation.intervals import bounds, drawn
from tools.evaluation.learnt import auroc
from tools.evaluation.likelihood import rolling
from tools.evaluation.slices import sliced
from tools.evaluation.spool import Spool
from tools.evaluation.values import Floats, Part, Table

FEW = ("--resamples", 20)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = small_models(tmp_path_factory.mktemp("evaluation"))
    rows = rows_of(home)
    choices = [
        {"query": f"the {row['text'].split()[0]}", "choices": [" ".join(WORDS[i : i + 1 + i % 3]) for i in range(4)]}
        for row in rows
    ]
    lines = [{**row, "gold": i % 4, "kind": "even" if i % 2 else "odd"} for i, row in enumerate(choices)]
    (home / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cloze = [{"context": " ".join(w[:-1]), "continuation": w[-1]} for row in rows if len(w := row["text"].split()) > 1]
    (home / "cloze.jsonl").write_text("".join(json.dumps(line) + "\n" for line in cloze))
    torch.manual_seed(1)
    bert = BertConfig(vocab_size=400, max_position_embeddings=32, pad_token_id=3, initializer_range=1.0, **SIZES)
    train = AutoTokenizer.from_pretrained(home / "bert")
    train.save_pretrained(home / "masked")
    BertForMaskedLM(bert).save_pretrained(home / "masked")
    return home


def plain_nats(home: Path, context: str, continuation: str) -> tuple[float, bool]:
    """One pair at a time through the model, all logits, in fp64."""
    tokenizer = AutoTokenizer.from_pretrained(home / "gpt")
    model = AutoModelForCausalLM.from_pretrained(home / "gpt").double().eval()
    first, whole = (tokenizer(text)["input_ids"] for text in (context, context + continuation))
    num_new = len(whole) - len(first)
    ids = whole[-17:]  # 16 positions, and the last token is only a target
    with torch.no_grad():
        logps = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[-num_new:]
    wanted = torch.tensor(ids[-num_new:])
    return float(logps[torch.arange(num_new), wanted].sum()), bool((logps.argmax(-1) == wanted).all())


@pytest.mark.parametrize("more", [("--batch-size", 1), ("--batch-size", 7), ("--max-batch-tokens", 64)])
def test_choices_and_last_words_are_those_of_a_plain_loop(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[object, ...]
) -> None:
    rows = [json.loads(line) for line in (home / "choices.jsonl").read_text().splitlines()][:12]
    nats = np.array([[plain_nats(home, row["query"], " " + choice)[0] for choice in row["choices"]] for row in rows])
    normed = nats / [[len(choice) for choice in row["choices"]] for row in rows]
    gold = np.array([row["gold"] for row in rows])
    argv = (home / "gpt", "--task", "multiple_choice", "--data", home / "choices.jsonl", "--limit", 12, *FEW, *more)
    said = scored(capsys, *argv, "--save", tmp_path / "saved.jsonl")
    assert said["metrics"]["accuracy"] == printed((nats.argmax(1) == gold).mean())
    assert said["metrics"]["accuracy_norm"] == printed((normed.argmax(1) == gold).mean())
    kept = [json.loads(line) for line in (tmp_path / "saved.jsonl").read_text().splitlines()[1:]]
    np.testing.assert_allclose([line["choice_nats"] for line in kept], nats, rtol=2e-6)
    rows = [json.loads(line) for line in (home / "cloze.jsonl").read_text().splitlines()][:12]
    found = [plain_nats(home, row["context"], " " + row["continuation"]) for row in rows]
    said = scored(capsys, home / "gpt", "--task", "cloze", "--data", home / "cloze.jsonl", "--limit", 12, *FEW, *more)
    assert said["limited"] is True
    assert said["metrics"]["accuracy"] == printed(float(np.mean([greedy for _, greedy in found])))
    assert said["metrics"]["perplexity"] == pytest.approx(math.exp(-np.mean([nat for nat, _ in found])), rel=1e-5)


@pytest.mark.parametrize(("length", "limit", "stride"), [(1, 8, 3), (8, 8, 3), (9, 8, 3), (50, 8, 1), (50, 8, 7)])
def test_windows_score_each_token_once_with_enough_before_it(length: int, limit: int, stride: int) -> None:
    ids = list(range(100, 101 + length))
    rows = rolling(ids, limit, stride)
    assert [token for row in rows for token in row["input_ids"][row["first"] :]] == ids[1:]
    assert all(len(row["input_ids"]) <= limit + 1 for row in rows)
    assert rows[0]["first"] == 1
    assert all(row["first"] >= stride for row in rows[1:])


@pytest.mark.parametrize("stride", [1, 5, 15])
def test_perplexity_of_documents_is_that_of_a_plain_loop(
    home: Path, capsys: pytest.CaptureFixture[str], stride: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(home / "gpt")
    model = AutoModelForCausalLM.from_pretrained(home / "gpt").double().eval()
    total, tokens, num_bytes = 0.0, 0, 0
    for row in rows_of(home):
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        ids = [tokenizer.bos_token_id, *ids]
        num_bytes += len(row["text"].encode())
        for window in rolling(ids, 16, stride):
            with torch.no_grad():
                logits = model(torch.tensor([window["input_ids"][:-1]])).logits[0]
            targets = torch.tensor(window["input_ids"][1:])
            losses = functional.cross_entropy(logits, targets, reduction="none")[window["first"] - 1 :]
            total, tokens = total + float(losses.sum()), tokens + len(losses)
    argv = ("--task", "perplexity", "--data", home / "rows.jsonl", "--stride", stride, *FEW)
    found = scored(capsys, home / "gpt", *argv)["metrics"]
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / num_bytes / math.log(2), rel=1e-5)
    assert found["bits_per_token"] == pytest.approx(total / tokens / math.log(2), rel=1e-5)


def test_pseudo_perplexity_hides_the_rest_of_the_word(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(home / "masked")
    model = BertForMaskedLM.from_pretrained(home / "masked").double().eval()
    total, tokens = 0.0, 0
    for row in rows_of(home)[:8]:
        encoded = tokenizer(row["text"][:40], add_special_tokens=False)
        ids, words = encoded["input_ids"], encoded.word_ids(0)
        for place, word in enumerate(words):
            hidden = list(ids)
            for later in range(place, len(ids)):
                if words[later] != word:
                    break
                hidden[later] = tokenizer.mask_token_id
            framed = [tokenizer.cls_token_id, *hidden, tokenizer.sep_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([framed])).logits[0, place + 1]
            total += float(functional.cross_entropy(logits, torch.tensor(ids[place])))
            tokens += 1
    rows = home / "short.jsonl"
    rows.write_text("".join(json.dumps({"text": row["text"][:40]}) + "\n" for row in rows_of(home)[:8]))
    found = scored(capsys, home / "masked", "--task", "pseudo_perplexity", "--data", rows, *FEW)["metrics"]
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_bleu_chrf_and_rouge_are_the_libraries(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, corpus_chrf

    rows = [{"prompt": row["text"][:9], "answer": row["text"]} for row in rows_of(home)[:20]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ("--task", "generation", "--data", tmp_path / "rows.jsonl", "--max-new-tokens", 8, *FEW)
    found = scored(capsys, home / "gpt", *argv, "--save", tmp_path / "saved.jsonl")["metrics"]
    written = [json.loads(line)["prediction"] for line in (tmp_path / "saved.jsonl").read_text().splitlines()[1:]]
    wanted = [row["answer"] for row in rows]
    assert len(set(written)) > 5, "a model that always writes the same would prove little"
    assert found["bleu"] == printed(corpus_bleu(written, [wanted]).score)
    assert found["chrf"] == printed(corpus_chrf(written, [wanted]).score)
    rouge = RougeScorer(["rougeL"])
    expected = np.mean([rouge.score(*pair)["rougeL"].fmeasure for pair in zip(wanted, written, strict=True)])
    assert found["rougeL"] == printed(float(expected))


def test_the_last_number_is_found_as_in_gsm8k() -> None:
    cases = {
        "9 * 2 = $<<9*2=18>>18.\n#### 18": "18",
        "so it is $1,234.50.": "1234.5",
        "#### -7\n": "-7",
        "3 and 4": "4",
        "none": None,
    }
    assert {text: last_number(text) for text in cases} == cases


def means(values: Floats) -> Any:
    return lambda weights: {"mean": weights @ values / weights.sum(1), "log": np.log(weights @ values / weights.sum(1))}


@pytest.mark.parametrize("kind", ["accuracy", "loss", "f1"])
def test_an_interval_of_95_percent_holds_the_truth_95_times_in_100(kind: str) -> None:
    """1200 sets of 100 examples from a known source: between 93% and 97% of their intervals hold what is true of it."""
    draw = np.random.default_rng(5)
    held, sets, size = 0, 1200, 100
    for _ in range(sets):
        if kind == "accuracy":
            values, truth = (draw.random(size) < 0.7).astype(float), 0.7
        elif kind == "loss":
            values, truth = draw.gamma(4.0, 0.5, size), 2.0
        if kind == "f1":
            true = draw.random(size) < 0.4
            said = np.where(true, draw.random(size) < 0.7, draw.random(size) < 0.2)
            sums, truth = np.stack([true & said, true, said], 1).astype(float), 2 * 0.28 / (0.4 + 0.28 + 0.12)

            def measure(weights: Floats, sums: Floats = sums) -> dict[str, Floats]:
                hits, trues, saids = (weights @ sums).T
                return {"mean": 2 * hits / (trues + saids)}
        else:
            measure = means(values)
        low, high = bounds(drawn(measure, size, 400)["mean"], size)
        held += low <= truth <= high
    assert 0.93 <= held / sets <= 0.97


def test_a_comparison_says_better_worse_or_nothing() -> None:
    draw = np.random.default_rng(0)
    weak = (draw.random(400) < 0.6).astype(float)
    strong = np.where(draw.random(400) < 0.2, 1.0, weak)
    (gap, _) = differences(means(strong), means(weak), 400)
    assert (gap.verdict, gap.value) == ("better", pytest.approx((strong - weak).mean()))
    assert gap.p < 0.01
    assert differences(means(weak), means(strong), 400)[0].verdict == "worse"
    other = draw.permutation(weak)
    assert differences(means(weak), means(other), 400)[0].verdict == "no difference shown"
    assert differences(means(weak), means(weak), 400)[0].p == 1.0
    tables = [Table({"right": values}, 400) for values in (strong, weak)]
    test = mcnemar(*tables)
    assert test is not None
    only = int(((strong == 1) & (weak == 0)).sum())
    assert (test["only_this_right"], test["only_other_right"]) == (only, 0)
    assert test["p"] == pytest.approx(scipy.stats.binomtest(only, only).pvalue)


def test_calibration_is_that_of_the_libraries() -> None:
    draw = np.random.default_rng(3)
    shares = draw.random(300)
    truth = draw.random(300) < shares**2
    found = auroc(shares, truth, np.ones((1, 300)))[0]
    assert found == pytest.approx(roc_auc_score(truth, shares), abs=1e-12)
    twice = draw.integers(0, 3, 300)
    repeated = np.repeat(np.arange(300), twice)
    assert auroc(shares, truth, twice[None].astype(float))[0] == pytest.approx(
        roc_auc_score(truth[repeated], shares[repeated]), abs=1e-12
    )
    right = truth.astype(float)
    plain = sum(
        abs(right[some].mean() - shares[some].mean()) * some.sum() / 300
        for number in range(15)
        if (some := np.minimum((shares * 15).astype(int), 14) == number).any()
    )
    assert ece_of(shares, right, np.ones((1, 300)))[0] == pytest.approx(plain, abs=1e-12)
    assert sum(row["n"] for row in reliability(shares, right)) == 300


def test_slices_are_scored_as_if_alone() -> None:
    draw = np.random.default_rng(1)
    values, kinds = draw.random(90), np.array(["a", "b", "c"] * 30)
    table = Table({"slice:kind": kinds, "length": np.arange(90.0)}, 90)
    found = sliced(means(values), table, "kind", "mean")
    alone = {kind: values[kinds == kind].mean() for kind in "abc"}
    assert {name: part.value for name, _, part in found.parts} == pytest.approx(alone)
    assert found.worst == min(alone, key=lambda kind: alone[kind])
    assert found.gap.value == pytest.approx(max(alone.values()) - min(alone.values()))
    assert found.gap.low <= found.gap.value <= found.gap.high
    quarters = sliced(means(values), table, "length", "mean").parts
    assert [(name, n) for name, n, _ in quarters] == [
        ("0 to 22", 23),
        ("23 to 44", 22),
        ("45 to 66", 22),
        ("67 to 89", 23),
    ]
    many = Table({"slice:kind": np.array([str(i) for i in range(90)])}, 90)
    with pytest.raises(DataError, match="has 90 different values"):
        sliced(means(values), many, "kind", "mean")


def parts(lengths: list[int]) -> list[Part]:
    return [Part(i, 0, {"input_ids": [0] * n}, {}) for i, n in enumerate(lengths)]


def test_what_does_not_fit_into_memory_is_halved_and_remembered() -> None:
    sizes: list[int] = []

    def score(some: list[Part]) -> list[int]:
        sizes.append(len(some) * some[0].num_tokens)
        if sizes[-1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [part.example for part in some]

    budget = Budget(tokens=200)
    found = [one for batch in batches(parts([10] * 16 + [5] * 8), budget) for one in in_memory(batch, score, budget)]
    assert sorted(found) == list(range(24))
    assert budget.tokens <= 50
    assert sum(size > 40 for size in sizes) <= 3, "the smaller budget holds for what follows"
    with pytest.raises(ModelError, match="does not fit into memory beside one row of 50 tokens"):
        in_memory(parts([50]), score, Budget(tokens=50))
    with pytest.raises(RuntimeError, match="another"):
        in_memory(parts([5]), lambda some: (_ for _ in ()).throw(RuntimeError("another")), budget)


def test_a_spool_goes_on_after_a_torn_line_and_belongs_to_one_question(tmp_path: Path) -> None:
    some = [Part(i // 2, i % 2, {"input_ids": [0]}, {"length": i}) for i in range(6)]
    with Spool(tmp_path, "key", 0) as spool:
        spool.put(0, some[2:4], [{"nats": -1.0}, {"nats": -2.0}])
    path = next(tmp_path.glob("*.jsonl"))
    path.write_text(path.read_text() + '{"window": 0, "exam')
    with Spool(tmp_path, "key", 1) as spool:
        assert spool.done == {(1, 0), (1, 1)}
        spool.put(0, some[:2], [{"nats": -3.0}, {"nats": -4.0}])
        spool.put(1, some[4:], [{"nats": -5.0}, {"nats": -6.0}])
        found = [(number, [one["nats"] for one in outcomes]) for number, _, outcomes in spool.examples()]
    assert found == [(0, [-3.0, -4.0]), (1, [-1.0, -2.0]), (2, [-5.0, -6.0])]
    with pytest.raises(DataError, match="another model, other data or other options"):
        Spool(tmp_path, "other", 0)


def test_predictions_are_kept_compared_and_never_overwritten(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = tmp_path / "out", home / "rows.jsonl"
    argv = (home / "bert", "--task", "sequence_classification", "--data", rows, *FEW)
    said = scored(capsys, *argv, "--out", out, "--slice", "label", "--slice", "length")
    assert json.loads((out / "results.json").read_text()) == said
    assert sorted(path.name for path in out.iterdir()) == [
        "predictions.jsonl",
        "reliability.png",
        "results.json",
        "results.txt",
    ]
    assert {row["metric"] for row in said["results"]} == set(said["metrics"])
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] == 50 for row in said["results"][:2])
    kept = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    shares = np.array([line["probabilities"] for line in kept[1:]])
    labels = np.array([("ham", "eggs", "spam").index(line["truth"]) for line in kept[1:]])
    assert said["metrics"]["loss"] == pytest.approx(log_loss(labels, shares), rel=1e-5)
    both = scored(capsys, *argv, "--out", out, "--slice", "label", "--slice", "length", "--against", home / "bert")
    assert {one["verdict"] for one in both["differences"]} == {"no difference shown"}
    filed = scored(capsys, *argv, "--against", out / "predictions.jsonl")
    assert filed["against"] == str(home / "bert")
    assert filed["mcnemar"] == {"only_this_right": 0, "only_other_right": 0, "p": 1.0}
    other = refusal(capsys, *argv, "--limit", 3, "--out", out)
    assert other == (
        f"--out: {out / 'predictions.jsonl'} holds the predictions of another model, other data or other options; "
        "name another file"
    )
    torn = tmp_path / "torn.jsonl"
    torn.write_text("".join((out / "predictions.jsonl").read_text().splitlines(keepends=True)[:-3]))
    assert refusal(capsys, *argv, "--against", torn) == (
        f"{torn}: is truncated: it holds 47 of the 50 examples that its first line promises; "
        "copy it again, or make it again with --save"
    )


def test_an_ensemble_averages_probabilities_or_votes(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(7)
    config = BertConfig.from_pretrained(home / "bert")
    AutoTokenizer.from_pretrained(home / "bert").save_pretrained(tmp_path / "other")
    BertForSequenceClassification(config).save_pretrained(tmp_path / "other")
    argv = ("--task", "sequence_classification", "--data", home / "rows.jsonl", *FEW)
    kept = []
    for name, model in (("one", [home / "bert"]), ("two", [tmp_path / "other"])):
        scored(capsys, *model, *argv, "--save", tmp_path / name)
        lines = (tmp_path / name).read_text().splitlines()[1:]
        kept.append(np.array([json.loads(line)["probabilities"] for line in lines]))
    scored(capsys, home / "bert", *argv, "--ensemble", tmp_path / "other", "--save", tmp_path / "both")
    both = np.array([json.loads(line)["probabilities"] for line in (tmp_path / "both").read_text().splitlines()[1:]])
    np.testing.assert_allclose(both, (kept[0] + kept[1]) / 2, rtol=1e-5)
    voted = scored(capsys, home / "bert", *argv, "--ensemble", home / "bert", tmp_path / "other", "--combine", "vote")
    alone = scored(capsys, home / "bert", *argv)
    assert voted["metrics"]["accuracy"] == alone["metrics"]["accuracy"], "two of three votes"


def test_what_would_be_averaged_over_is_named(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (home / "gpt").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.ln_f.weight"][3] = math.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    data = home / "cloze.jsonl"
    said = refusal(capsys, tmp_path, "--task", "cloze", "--data", data, "--batch-size", 1)
    assert re.fullmatch(
        rf"MODEL: {re.escape(str(tmp_path))} gives a score that is not a finite number \(NaN or infinite logits\) on "
        rf"{re.escape(str(data))}:\d+; look at the end of its training, or at its precision",
        said,
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "a", "choices": ["b", "c"], "gold": 2}\n')
    argv = (home / "gpt", "--task", "multiple_choice", "--data", rows)
    assert refusal(capsys, *argv) == (
        f"{rows}:1: gold: 2 is neither one of the 2 choices nor its place from 0; say which choice is right"
    )
    assert refusal(capsys, *argv, "--column", "gold=answer") == (
        f"{rows}:1: has no column `answer` but query, choices, gold; name it with --column FIELD=NAME"
    )
    assert refusal(capsys, *argv, "--stride", 4) == (
        "--stride: 4 has no effect on multiple_choice: it belongs to perplexity; leave it out"
    )
    assert refusal(capsys, home / "bert", "--task", "pseudo_perplexity", "--data", data).startswith("MODEL: ")


def test_code_in_a_model_folder_runs_only_where_it_is_trusted(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (home / "gpt").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ran = tmp_path / "it-ran"
    (tmp_path / "mine.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class MyConfig(GPT2Config):\n    model_type = 'mine'\n"
        "class Mine(GPT2LMHeadModel):\n    config_class = MyConfig\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Mine"]}
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.Mine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = (tmp_path, "--task", "cloze", "--data", home / "cloze.jsonl", *FEW)
    assert refusal(capsys, *argv).startswith(f"MODEL: {tmp_path} cannot be opened (")
    assert not ran.exists()
    assert main([*map(str, argv), "--trust-remote-code"]) == 0
    assert ran.exists()


def test_an_explanation_sums_to_the_answer_and_can_be_read(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Completeness: attributions sum to the answer's log-probability less that of padding; rows of attention sum to 1."""
    pytest.importorskip("captum", reason="the extra `explain` is not installed")
    from tools.evaluation import explain

    text = "the quick brown fox"
    assert explain.main([str(home / "bert"), "--text", text, "--target", "eggs", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("eggs, probability ")
    page = (tmp_path / "explain.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace("http-equiv", "")
    place = explain.find(str(home / "bert"))
    model = explain.opened([place], "AutoModelForSequenceClassification", "explaining")
    model.modules[0].set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    found = explain.explain(model, tokenizer, text, "eggs")
    module, encoded = model.modules[0], tokenizer(text, return_tensors="pt")
    blank = torch.full_like(encoded["input_ids"], 3)
    with torch.no_grad():
        both = [module(input_ids=ids).logits.log_softmax(-1)[0, 1] for ids in (encoded["input_ids"], blank)]
    assert found.attributions.sum() == pytest.approx(float(both[0] - both[1]), abs=max(0.02, 1.5 * found.missing))
    assert found.missing < 0.1 * abs(float(both[0] - both[1])) + 0.02
    np.testing.assert_allclose(found.attention.sum(-1), 1.0, atol=1e-5)
    assert explain.main([str(home / "bert"), "--text", text, "--target", "tofu"]) == 2
    assert capsys.readouterr().err == (
        "error: --target: tofu is not a label of the model, which knows ham, eggs, spam; give one of these\n"
    )


def test_an_adapter_is_scored_with_its_base(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A PEFT folder scores what its merged model does; spread over devices by accelerate, the same."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    settings = LoraConfig(
        r=4, init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(home / "gpt"), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(home / "gpt")
    tokenizer.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    capsys.readouterr()
    argv = ("--task", "perplexity", "--data", home / "rows.jsonl", *FEW)
    merged = scored(capsys, tmp_path / "merged", *argv)["metrics"]
    assert scored(capsys, tmp_path / "adapter", *argv)["metrics"] == pytest.approx(merged, rel=1e-5)
    assert merged != scored(capsys, home / "gpt", *argv)["metrics"]
    assert scored(capsys, tmp_path / "merged", *argv, "--device-map", "auto")["metrics"] == merged
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "gone"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert refusal(capsys, tmp_path / "adapter", *argv) == (
        f"MODEL: {tmp_path / 'adapter'} has adapters of gone, which is not a folder; "
        "mend base_model_name_or_path in adapter_config.json"
    )
