"""lm-eval's tasks get the same figures over a bit-exact reload as without one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

# Before lm-eval imports `datasets`, which reads it once.
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from kvtc_vllm.cli import main
from kvtc_vllm.evaluation import methods
from kvtc_vllm.evaluation.data import generators
from kvtc_vllm.evaluation.processes import harness_suite
from kvtc_vllm.evaluation.processes.harness_suite import HarnessJob, HarnessOutcome
from kvtc_vllm.evaluation.processes.suite import run_child
from kvtc_vllm.evaluation.reporting.results import Row
from tests.evaluation.public_data import write_public_data

DOCUMENTS = 6
CHUNK_TOKENS = 128
PAIRS = 30
TASKS = ["kvtc_group", "kvtc_generate", "kvtc_text"]


def look_up(number: int, pairs: int) -> dict[str, Any]:
    """A table of names and numbers, a question, and four answers of which one is right."""
    rng = generators.seeded("eval", number, "harness")
    exercise = generators.kv_retrieval(rng, "eval", pairs=pairs)
    prompt, _ = exercise.example()
    choices = [answer.rstrip("\n") for _, answer in exercise.answers[:4]]
    return {"prompt": prompt, "choices": choices, "answer": 0, "value": choices[0]}


def write_task(directory: Path, name: str, documents: list[dict[str, Any]], **options: Any) -> None:
    """A task definition with its documents beside it."""
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
        "target_delimiter": "",
        **options,
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(definition))


@pytest.fixture(scope="module")
def task_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Definitions of `TASKS`; the group has the tasks kvtc_choice and kvtc_short."""
    directory = tmp_path_factory.mktemp("tasks")
    long = [look_up(number, PAIRS) for number in range(DOCUMENTS)]
    short = [look_up(number, 4) for number in range(DOCUMENTS)]
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    write_task(directory, "kvtc_choice", long, **choice)
    write_task(directory, "kvtc_short", short, **choice)
    write_task(
        directory,
        "kvtc_generate",
        long,
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="value",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
        metric_list=[{"metric": "exact_match"}],
    )
    write_task(
        directory,
        "kvtc_text",
        [{"text": document["prompt"]} for document in long[:2]],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": "word_perplexity"}],
    )
    group = {
        "group": "kvtc_group",
        "task": ["kvtc_choice", "kvtc_short"],
        "aggregate_metric_list": [{"metric": "acc"}],
    }
    (directory / "kvtc_group.yaml").write_text(yaml.safe_dump(group))
    return directory


@pytest.fixture(scope="module")
def outcome(
    reference_model: Path, task_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HarnessOutcome]:
    """All tasks with the raw codec."""
    from lm_eval.tasks import TaskManager

    from kvtc_vllm.evaluation.processes.harness import measure
    from kvtc_vllm.evaluation.replay.engine import replay_engine

    options = {"dtype": "float32", "max_model_len": 1024, "block_size": 32}
    job = HarnessJob(
        model=str(reference_model),
        methods=[methods.find("raw")],
        tasks=TASKS,
        task_path=str(task_path),
        source=None,
        limit=None,
        few_shot=None,
        engine=options,
    )
    manager = TaskManager(include_path=str(task_path), include_defaults=False)
    with replay_engine(job.model, job.methods[0], CHUNK_TOKENS, options) as engine:
        yield measure(engine, manager, job, tmp_path_factory.mktemp("scores"))


def value(rows: list[Row], task: str, metric: str) -> float:
    (row,) = [row for row in rows if (row.task, row.metric) == (f"lm-eval/{task}", metric)]
    return row.value


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("task", "metric"),
    [("kvtc_choice", "acc"), ("kvtc_generate", "exact_match"), ("kvtc_text", "word_perplexity")],
)
def test_a_bit_exact_reload_changes_no_figure(
    outcome: HarnessOutcome, task: str, metric: str
) -> None:
    exact = value(outcome.exact, task, metric)
    assert value(outcome.replay, task, metric) == pytest.approx(exact, rel=1e-5)
    assert value(outcome.replay, task, "reloaded_share") > 0.2
    # The model answers some questions, or equal figures would prove nothing.
    assert exact > 0


@pytest.mark.vllm
def test_rows_say_what_they_count(outcome: HarnessOutcome) -> None:
    rows = {(row.task, row.metric): row for row in outcome.replay}
    accuracy = rows["lm-eval/kvtc_choice", "acc"]
    assert (accuracy.method, accuracy.n) == ("raw", DOCUMENTS)
    assert accuracy.ci95[0] <= accuracy.value <= accuracy.ci95[1]
    assert 256 <= accuracy.context < 1024
    assert accuracy.real_ratio == pytest.approx(1, rel=0.05)
    assert rows["lm-eval/kvtc_choice", "reloaded_share"].n == 4 * DOCUMENTS
    assert {row.method for row in outcome.exact} == {"exact"}
    group, short = rows["lm-eval/kvtc_group", "acc"], rows["lm-eval/kvtc_short", "acc"]
    assert group.value == pytest.approx((accuracy.value + short.value) / 2)
    assert (group.n, group.context) == (2 * DOCUMENTS, accuracy.context)
    # Written as MessagePack, since intervals can be infinite.
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(outcome), type=HarnessOutcome) == outcome


def test_a_change_is_between_runs_of_the_same_document() -> None:
    """Documents differ by far more than runs do, and lm-eval may give them in any order."""
    from kvtc_vllm.evaluation.processes.harness import changes

    def sample(number: int, nll: float, right: float) -> dict[str, Any]:
        values = {"nll": nll, "acc": right, "word_perplexity": (nll, 7)}
        return {"doc_id": number, "filter": "none", "metrics": list(values), **values}

    exact = [sample(0, 100.0, 1.0), sample(1, 200.0, 0.0), sample(2, 50.0, 1.0)]
    replayed = [sample(2, 51.0, 1.0), sample(0, 100.5, 0.0), sample(1, 200.5, 0.0)]
    found = changes(exact, replayed)
    assert {name: sorted(values.tolist()) for name, values in found.items()} == {
        "nll_change": [0.5, 0.5, 1.0],
        "acc_change": [-1.0, 0.0, 0.0],
    }


@pytest.mark.vllm
def test_changes_have_intervals_of_differences(outcome: HarnessOutcome) -> None:
    rows = {(row.task, row.metric): row for row in outcome.replay}
    change = rows["lm-eval/kvtc_choice", "acc_change"]
    assert (change.value, change.ci95, change.n) == (0.0, (0.0, 0.0), DOCUMENTS)
    assert not any(row.metric.endswith("_change") for row in outcome.exact)


@pytest.mark.vllm
def test_a_task_of_which_nothing_is_reloaded_is_called_out(outcome: HarnessOutcome) -> None:
    (warning,) = outcome.warnings
    assert warning.startswith("kvtc_short: nothing was reloaded")
    assert "a reload needs 160" in warning
    assert value(outcome.replay, "kvtc_short", "reloaded_share") == 0
    text = harness_suite.markdown({"warnings": outcome.warnings}, outcome.exact + outcome.replay)
    assert f"**Warning: {warning}**" in text
    assert "| raw | 1.0 | " in text


def test_figures_of_more_documents_have_a_table_of_their_own() -> None:
    first = Row(
        task="lm-eval/t",
        method="raw",
        plan="",
        real_ratio=1.0,
        context=10,
        label="",
        metric="acc",
        value=0.25,
        ci95=(0.0, 0.5),
        n=4,
    )
    more = msgspec.structs.replace(first, context=20, value=0.5, n=8)
    text = harness_suite.markdown({"warnings": []}, [first, more])
    for row in (first, more):
        table = text.split(f"## lm-eval/t, prompts of up to {row.context} tokens")[1]
        assert f"| raw | 1.0 | {row.value:.3f}" in table.split("##")[0]


@pytest.mark.vllm
def test_methods_share_their_exact_answers(reference_model: Path, task_path: Path) -> None:
    """In a process of its own, since whose turn it is belongs to a process."""
    job = HarnessJob(
        model=str(reference_model),
        methods=[methods.find(name) for name in ("raw", "kivi-2bit")],
        tasks=["kvtc_choice"],
        task_path=str(task_path),
        source=None,
        limit=4,
        few_shot=None,
        engine={"dtype": "float32", "max_model_len": 1024, "block_size": 32},
    )
    found = run_child("kvtc_vllm.evaluation.processes.harness", "both", job, HarnessOutcome)
    rows = {(row.method, row.metric): row for row in found.replay}
    assert {row.method for row in found.exact} == {"exact"}
    assert rows["raw", "acc"].value == value(found.exact, "kvtc_choice", "acc")
    assert rows["raw", "acc"].real_ratio == pytest.approx(1, rel=0.05)
    assert rows["kivi-2bit", "acc"].real_ratio > 4
    assert rows["raw", "reloaded_share"].value == rows["kivi-2bit", "reloaded_share"].value > 0.2


class Forgetful:
    """Stands in for a `ReplayEngine` whose tier never returns anything."""

    max_model_len = 1024

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = lambda: tokenizer

    def counters(self) -> dict[str, float]:
        return {}

    def reloadable(self, stored_tokens: int, prompt_tokens: int) -> int:
        return 32

    def drop_gpu_cache(self) -> None:
        pass

    def generate(self, requests: Sequence[Any]) -> list[str]:
        return ["an answer"] * len(requests)


def test_a_replay_that_reloads_nothing_is_an_error(reference_model: Path, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from transformers import AutoTokenizer

    from kvtc_vllm.evaluation.processes.two_pass_lm import TwoPassLM
    from kvtc_vllm.evaluation.replay.two_passes import ReplayError

    model: Any = TwoPassLM(
        Forgetful(AutoTokenizer.from_pretrained(reference_model)), tmp_path, ["raw"]
    )
    request = Instance("generate_until", {}, ("A question?", {"until": ["\n"]}), 0, ("t", 0, 1))
    with pytest.raises(ReplayError, match="0 tokens came from the tier, 32 should have"):
        model.generate_until([request])


def test_options_of_lm_eval_need_lm_eval(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "anything", "--limit", "3"]) == 2
    assert "--limit and --few-shot" in capsys.readouterr().err


def test_without_lm_eval_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", "anything", "--lm-eval", "gsm8k"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'kvtc-vllm[eval]'" in line


def test_our_own_tasks_read_their_part_of_the_data(tmp_path: Path) -> None:
    from kvtc_vllm.evaluation.data.public import Source
    from kvtc_vllm.evaluation.processes.harness import task_manager

    job = HarnessJob(
        model="any",
        methods=[methods.find("raw")],
        tasks=["kvtc_gsm8k", "kvtc_passage_choice"],
        task_path=None,
        source=Source(str(write_public_data(tmp_path)), "report"),
        limit=None,
        few_shot=None,
        engine={},
    )
    loaded: Any = task_manager(job).load(job.tasks)["tasks"]
    problems = list(loaded["kvtc_gsm8k"].test_docs())
    assert {int(problem["answer"].split("#### ")[1]) % 4 for problem in problems} == {3}
    choice = loaded["kvtc_passage_choice"]
    for document in choice.test_docs():
        right = choice.doc_to_choice(document)[choice.doc_to_target(document)]
        # Person 7 answers "who is number 7".
        assert right.removeprefix("Person ") == document["question"].removeprefix("who is number ")
        assert all(f" {answer} is it." in document["passages"] for answer in document["choices"])
