"""Gradients of a continuation with respect to cached K and V, in transformers.

The prefix of a document is computed without gradients. Its K and V are then the leaves of a graph
that computes the continuation. The label of every place is drawn from the model's own prediction
there, so that the mean squared gradient is the diagonal of a Fisher matrix: to second order, what
an error in the cache costs in KL divergence. Keys are differentiated with RoPE applied, which
rotates a gradient and leaves its norm. transformers is imported when called.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kvtc_vllm.artifact.identity import model_directory
from kvtc_vllm.calibration.capture import PREFILL_FACTOR, CaptureSettings
from kvtc_vllm.calibration.capture_record import CaptureRecord, texts_fingerprint
from kvtc_vllm.calibration.documents import DataError, Document, Text, make_documents, read_texts
from kvtc_vllm.calibration.sensitivity import (
    SENSITIVITY_NAME,
    Sensitivity,
    SensitivitySource,
    load_sensitivity,
    save_sensitivity,
)
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.codec.errors import ArtifactError


@dataclass(frozen=True)
class GradientSettings:
    """What gradients are taken of.

    documents: of the calibration text; held-out ones are left out.
    prefix_tokens, continuation_tokens: of each, at most. A shorter document is cut in proportion.
    """

    documents: int = 16
    prefix_tokens: int = 640
    continuation_tokens: int = 128


@dataclass(frozen=True)
class CacheShape:
    """What the gradients must be of: layers, KV heads of all ranks, head sizes of K and V."""

    layers: int
    kv_heads: int
    head_size: int
    head_size_v: int


class Differentiable:
    """A model in transformers whose prefix cache can be differentiated.

    directory: of the model. device: as torch names it; on a CPU arithmetic is float32, on a GPU
    the checkpoint's dtype. Raises ArtifactError if transformers cannot load it.
    """

    def __init__(self, directory: Path, device: str, *, trust_remote_code: bool = False) -> None:
        self.directory = directory
        self._device = torch.device(device)
        self._options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, **self._options)
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32 if self._device.type == "cpu" else "auto",
                **self._options,
            )
        except Exception as error:  # whatever a model's own code raises
            raise unusable(directory, error) from error
        self._model = model.eval().requires_grad_(False).to(self._device)

    @property
    def max_positions(self) -> int:
        """Longest prompt that the configuration allows."""
        config = self._model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2**31)

    def squared_gradients(
        self, ids: Sequence[int], prefix: int, shape: CacheShape, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over heads and elements: float64 [L, prefix] for K and for V.

        ids: of prefix and continuation. generator: draws the labels, on the CPU. Raises
        ArtifactError if the model does not run, or its cache is not of `shape`.
        """
        try:
            leaves, gradients = self._gradients(ids, prefix, generator)
        except Exception as error:
            raise unusable(self.directory, error) from error
        wanted = [(1, shape.kv_heads, prefix, n) for n in (shape.head_size, shape.head_size_v)]
        found = [tuple(leaf.shape) for leaf in leaves]
        if found != wanted * shape.layers:
            raise unusable(
                self.directory,
                f"its cache has {len(found) // 2} layers, the first of K {found[0]} and V "
                f"{found[1]}; captured were {shape.layers} of {wanted[0]} and {wanted[1]}",
            )
        squares = [gradient.double().square().sum((0, 1, 3)).cpu() for gradient in gradients]
        return torch.stack(squares[0::2]), torch.stack(squares[1::2])

    def _gradients(
        self, ids: Sequence[int], prefix: int, generator: torch.Generator
    ) -> tuple[list[torch.Tensor], Sequence[torch.Tensor]]:
        from transformers import DynamicCache

        tokens = torch.tensor([list(ids)], device=self._device)
        cache: Any = DynamicCache()
        with torch.no_grad():
            self._model(
                input_ids=tokens[:, :prefix],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        # Without the model's configuration every layer keeps all tokens, also one with a window.
        differentiable: Any = DynamicCache()
        leaves: list[torch.Tensor] = []
        for number, layer in enumerate(cache.layers):
            pair = [x.detach().clone().requires_grad_() for x in (layer.keys, layer.values)]
            differentiable.update(*pair, number)
            leaves += pair
        output = self._model(input_ids=tokens[:, prefix:], past_key_values=differentiable)
        likelihood = torch.log_softmax(output.logits[0].float(), dim=-1)
        chances = likelihood.detach().exp().cpu()
        labels = torch.multinomial(chances, 1, generator=generator).to(self._device)
        return leaves, torch.autograd.grad(likelihood.gather(1, labels).sum(), leaves)


def unusable(directory: Path, reason: Exception | str) -> ArtifactError:
    """That gradients cannot be had of this model, and what to give instead."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return ArtifactError(
        f"--sensitivity gradient: transformers cannot run {directory.name} as needed ({text}); "
        "give --sensitivity none"
    )


def check_supported(directory: Path, *, trust_remote_code: bool = False) -> None:
    """Raise ArtifactError if transformers does not know this model. Reads its configuration only.

    To be asked before a capture, which takes long.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        known = type(config) in AutoModelForCausalLM._model_mapping
        remote = trust_remote_code and "AutoModelForCausalLM" in (
            getattr(config, "auto_map", None) or {}
        )
    except Exception as error:
        raise unusable(directory, error) from error
    if not known and not remote:
        raise unusable(directory, f"it knows no causal language model for {type(config).__name__}")


def spool_sensitivity(
    capture: CaptureSettings,
    record: CaptureRecord,
    spool: Path,
    settings: GradientSettings,
    device: str,
    say: Callable[[str], None] = print,
) -> Path:
    """SPOOL/sensitivity.json of a finished capture, measured unless it is there.

    One of other settings or another text is replaced. Raises what `measure_sensitivity` does.
    """
    path = spool / SENSITIVITY_NAME
    texts = read_texts(capture.data, PREFILL_FACTOR * capture.tokens)
    header = SpoolReader(spool / "rank0").header
    geometry = header.geometry
    source = SensitivitySource(
        model=record.source.model,
        texts=texts_fingerprint(texts),
        documents=settings.documents,
        prefix_tokens=settings.prefix_tokens,
        continuation_tokens=settings.continuation_tokens,
        sink_tokens=capture.sink_tokens,
        max_len=capture.max_len,
        heldout_fraction=capture.heldout_fraction,
        seed=capture.seed,
    )
    if path.exists() and load_sensitivity(path, geometry.num_layers).source == source:
        say(f"{path}: measured earlier with the same settings, used again")
        return path
    max_model_len = capture.engine.get("max_model_len")
    found = measure_sensitivity(
        model_directory(capture.model, capture.engine.get("revision")),
        texts,
        CacheShape(
            geometry.num_layers, header.total_kv_heads, geometry.head_size, geometry.head_size_v
        ),
        source,
        total_tokens=PREFILL_FACTOR * capture.tokens,
        device=device,
        max_model_len=max_model_len if isinstance(max_model_len, int) else None,
        trust_remote_code=bool(capture.engine.get("trust_remote_code")),
        say=say,
    )
    save_sensitivity(path, found)
    return path


def measure_sensitivity(
    directory: Path,
    texts: Sequence[Text],
    shape: CacheShape,
    source: SensitivitySource,
    *,
    total_tokens: int,
    device: str = "cpu",
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> Sensitivity:
    """Average squared gradients over documents of calibration text that are not held out.

    texts: what a capture reads, cut into the same documents. source: how many documents, how
    long, and the seed of what is drawn; equal seeds give equal documents and labels. total_tokens:
    of all documents of the capture. max_model_len: of the engine; None: the model's. Shows a
    progress bar. Raises ArtifactError if transformers cannot run the model, DataError if there is
    too little text.
    """
    model = Differentiable(directory, device, trust_remote_code=trust_remote_code)

    def render(text: Text) -> str:
        if isinstance(text, str):
            return text
        return str(model.tokenizer.apply_chat_template(text, tokenize=False))

    drawn = draw_documents(
        make_documents(
            map(render, texts),
            model.tokenizer.encode,
            max_tokens=min(source.max_len, (max_model_len or model.max_positions) - 1),
            total_tokens=total_tokens,
            heldout_fraction=source.heldout_fraction,
            seed=source.seed,
        ),
        source,
    )
    generator = torch.Generator().manual_seed(source.seed)
    totals = torch.zeros(2, shape.layers, dtype=torch.float64)
    tokens = 0
    for document in tqdm(drawn, unit="document", desc="gradients"):
        ids = document.token_ids[: source.prefix_tokens + source.continuation_tokens]
        share = source.prefix_tokens / (source.prefix_tokens + source.continuation_tokens)
        prefix = min(source.prefix_tokens, round(share * len(ids)))
        if prefix <= source.sink_tokens:
            continue
        squares = model.squared_gradients(ids, prefix, shape, generator)
        for total, of_kind in zip(totals, squares, strict=True):
            total += of_kind[:, source.sink_tokens :].sum(dim=1)
        tokens += prefix - source.sink_tokens
    if tokens < 1:
        raise DataError(
            f"--sensitivity gradient: documents of {source.max_len} tokens have none past the "
            f"{source.sink_tokens} sinks to take gradients of; give a larger --max-len"
        )
    per_element = [
        totals[i] / (tokens * shape.kv_heads * size)
        for i, size in enumerate((shape.head_size, shape.head_size_v))
    ]
    if not bool(torch.stack(per_element).isfinite().all()) or not bool(totals.any()):
        raise unusable(directory, "gradients are not finite, or all 0")
    numbers = tuple(document.doc for document in drawn)
    say(f"gradients of {tokens} tokens in documents {', '.join(map(str, numbers))}")
    return Sensitivity(
        keys=tuple(per_element[0].tolist()),
        values=tuple(per_element[1].tolist()),
        documents=numbers,
        tokens=tokens,
        source=source,
    )


def draw_documents(documents: Sequence[Document], source: SensitivitySource) -> list[Document]:
    """Documents of the fit, in order of their numbers: long enough ones, else the longest."""
    wanted = source.prefix_tokens + source.continuation_tokens
    usable = [d for d in documents if not d.heldout]
    random.Random(source.seed).shuffle(usable)
    # Stable: among those that are long enough the draw decides.
    usable.sort(key=lambda d: -min(len(d.token_ids), wanted))
    return sorted(usable[: source.documents], key=lambda d: d.doc)
