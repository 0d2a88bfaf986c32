"""A spool of sampled KV rows: an earlier one, or a model run in vLLM, imported when called."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvtc_vllm.artifact.identity import model_directory, model_identity, public_model_name
from kvtc_vllm.calibration.capture_record import (
    CaptureRecord,
    CaptureSource,
    capturing,
    check_same,
    clear,
    find_record,
    save_record,
    texts_fingerprint,
    tokenizer_fingerprint,
)
from kvtc_vllm.calibration.documents import Document, Text, make_documents, read_texts

PREFILL_FACTOR = 2
"""Tokens run through the model for each one kept: spreads the sample over more text."""
MOST_MEMORY = 0.92
"""Share of a machine's memory that vLLM asks for on a CPU by default."""
OF_AVAILABLE = 0.8
"""What a capture asks for instead, as a share of what others have left of the memory."""


@dataclass(frozen=True)
class CaptureSettings:
    """What to run.

    model: directory or hub name.
    data: as `documents.read_texts` takes them.
    tokens: rows to sample for the fit, sinks left out; held-out rows come on top.
    max_len: longest document in tokens.
    tp: tensor-parallel size to run at; the spool serves others too.
    sink_tokens: first positions of every document, which are left out.
    heldout_fraction: of the documents, kept from the fit.
    seed: of cutting and sampling.
    engine: further arguments of `vllm.LLM`.
    """

    model: str
    data: tuple[str, ...]
    tokens: int = 160_000
    max_len: int = 8192
    tp: int = 1
    sink_tokens: int = 4
    heldout_fraction: float = 0.1
    seed: int = 0
    engine: dict[str, Any] = field(default_factory=dict)


def capture_rows(
    settings: CaptureSettings, spool: Path, say: Callable[[str], None] = print
) -> CaptureRecord:
    """Fill SPOOL/rank0 .. rank{tp-1}, or use a spool that a run with these settings left.

    A capture that did not finish is made again from its beginning. say: is told which of these.
    Raises DataError for unreadable data before any document runs, ArtifactError for a spool of
    other settings, or one that another process captures into.
    """
    texts = read_texts(settings.data, PREFILL_FACTOR * settings.tokens)
    with capturing(spool):
        found = find_record(spool)
        if found is not None:
            revision = settings.engine.get("revision")
            model = model_directory(settings.model, revision)
            wanted = _source(settings, texts, model, model_identity(model).identity)
            check_same(spool, found.source, wanted)
            say(f"spool {spool}: captured earlier with the same settings, used again")
            return found
        if clear(spool):
            say(f"spool {spool}: the earlier capture did not finish, captured anew")
        tokens, path, revision = _run_model(settings, texts, spool)
        model = model_directory(path, revision)
        record = CaptureRecord(
            model_name=public_model_name(settings.model),
            files=tuple(
                source if source.startswith("hf:") else Path(source).name
                for source in settings.data
            ),
            tp_size=settings.tp,
            source=_source(settings, texts, model, model_identity(path, revision).identity),
            tokens_run=tokens,
        )
        save_record(spool, record)
        return record


def _source(
    settings: CaptureSettings, texts: Sequence[Text], model: Path, identity: str
) -> CaptureSource:
    return CaptureSource(
        model=identity,
        tokenizer=tokenizer_fingerprint(model),
        texts=texts_fingerprint(texts),
        tokens=settings.tokens,
        max_len=settings.max_len,
        sink_tokens=settings.sink_tokens,
        heldout_fraction=settings.heldout_fraction,
        seed=settings.seed,
        engine=settings.engine,
    )


def engine_memory(tp: int) -> dict[str, float]:
    """Arguments of `vllm.LLM` that fit the memory which is free now, where it runs on a CPU.

    vLLM asks for a share of all memory, used or not, and does not start where less is free. Empty
    on a GPU, and where the environment says how much vLLM may take. tp: ranks on this machine.
    """
    import psutil  # vLLM brings it
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return {}
    memory = psutil.virtual_memory()
    free = OF_AVAILABLE * memory.available / memory.total / tp
    return {"gpu_memory_utilization": min(MOST_MEMORY, round(free, 3))}


def _run_model(
    settings: CaptureSettings, texts: Sequence[Text], spool: Path
) -> tuple[int, str, str | None]:
    """Run the text; returns tokens run, and model and revision as vLLM resolved them."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    from kvtc_vllm.calibration.capture_connector import KVTCCaptureConnector

    llm = LLM(
        model=settings.model,
        tensor_parallel_size=settings.tp,
        enable_prefix_caching=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector=KVTCCaptureConnector.__name__,
            kv_connector_module_path=KVTCCaptureConnector.__module__,
            kv_role="kv_both",
            kv_connector_extra_config={
                "spool": str(spool.resolve()),
                "seed": settings.seed,
                "sink_tokens": settings.sink_tokens,
            },
        ),
        **{
            "enforce_eager": True,
            "seed": settings.seed,
            **engine_memory(settings.tp),
            **settings.engine,
        },
    )
    tokenizer = llm.get_tokenizer()

    def render(text: Text) -> str:
        if isinstance(text, str):
            return text
        return str(tokenizer.apply_chat_template(text, tokenize=False))

    config = llm.llm_engine.model_config
    documents = make_documents(
        map(render, texts),
        tokenizer.encode,
        max_tokens=min(settings.max_len, config.max_model_len - 1),
        total_tokens=PREFILL_FACTOR * settings.tokens,
        heldout_fraction=settings.heldout_fraction,
        seed=settings.seed,
    )
    _run(llm, SamplingParams, documents, settings)
    # The engine's memory is given back before the fit asks for its own.
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return sum(len(d.token_ids) for d in documents), config.model, config.revision


def _run(llm: Any, sampling: Any, documents: Sequence[Document], settings: CaptureSettings) -> None:
    """Prefill every document, in batches so that a progress bar moves."""
    usable = sum(
        max(0, len(d.token_ids) - settings.sink_tokens) for d in documents if not d.heldout
    )
    keep = min(1.0, settings.tokens / max(1, usable))
    progress = tqdm(total=sum(len(d.token_ids) for d in documents), unit="tok", desc="capture")
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if sum(len(d.token_ids) for d in batch) >= settings.max_len or document is documents[-1]:
            llm.generate(
                [{"prompt_token_ids": d.token_ids} for d in batch],
                [
                    _one_token(sampling, kvtc_doc=d.doc, kvtc_heldout=d.heldout, kvtc_keep=keep)
                    for d in batch
                ],
                use_tqdm=False,
            )
            progress.update(sum(len(d.token_ids) for d in batch))
            batch = []
    progress.close()
    llm.generate(
        [{"prompt_token_ids": documents[0].token_ids[:1]}],
        [_one_token(sampling, kvtc_close=True)],
        use_tqdm=False,
    )


def _one_token(sampling: Any, **params: Any) -> Any:
    return sampling(temperature=0.0, max_tokens=1, extra_args={"kv_transfer_params": params})
