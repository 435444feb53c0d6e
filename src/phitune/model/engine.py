"""What turns a micro-batch into a loss and the adapter's gradients; two engines, one signature.

`ReferenceEngine` is the decoder in plain torch under autograd: the definition, for tests and for
doubt. `FusedEngine` is the fast twin: layers whose backward is written by hand, which keep little
or, where a plan says so, nothing but their input.

Not here: batches, optimizers, and how many layers a plan lets recompute.

Shapes: T packed tokens, N trained positions (padding rows included), n rows of a chunk, D hidden,
V vocabulary, X extra columns.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from phitune.model import architecture, ops
from phitune.model.attention import choose_attention
from phitune.model.decoder import Decoder, DecoderLayer
from phitune.model.device import (
    compile_layers,
    compile_refusal,
    guard_memory,
    keep_freed_memory,
    limit_product_caches,
    release_freed_memory,
    stop_keeping_freed_memory,
)
from phitune.model.fused import (
    Backend,
    FusedNorm,
    Kernels,
    Packed,
    Padded,
    WidenedLinear,
    pad,
    prepare_gradients,
    refresh,
)
from phitune.model.fused_layers import FUSED_LAYERS, FusedLayer, Saved, Shared
from phitune.model.gemm import choose_gemm, emulates_bf16, multiplies_bf16
from phitune.model.probe import choose_kernels
from phitune.model.products import Scratch


class Engine(ABC):
    """Losses and gradients of one decoder and the adapter on it.

    Only an engine knows how an allocation fails on its device, and that oneDNN may break a thread
    in which it did: both end here, in one type of error.
    """

    device: torch.device  # of the adapter, and where a batch is wanted
    device_name: str  # what computes, as settings name it: cpu, cuda:1, mps, mlx
    choices: dict[str, str]  # what was chosen, and why; for the user
    num_layers: int
    recompute_layers: int  # from the lowest; may be changed between two micro-batches

    def loss_and_gradients(
        self, batch: Packed, dropout: ops.Dropout | None, weight: float
    ) -> Tensor:
        """Adds the gradients of `weight` times the summed loss to the adapter's.

        Returns: scalar, the summed loss times `weight`; on the device, not waited for.

        Raises:
            OutOfMemoryError: an allocation failed; the gradients are of no use then.
        """
        return guard_memory(lambda: self._loss_and_gradients(batch, dropout, weight), self.device)

    def loss_sum(self, batch: Packed) -> Tensor:
        """The summed loss over the trained positions, without dropout. Returns: scalar.

        Raises:
            OutOfMemoryError: an allocation failed.
        """
        return guard_memory(lambda: self._loss_of(batch), self.device)

    @abstractmethod
    def _loss_and_gradients(
        self, batch: Packed, dropout: ops.Dropout | None, weight: float
    ) -> Tensor: ...  # scalar

    @abstractmethod
    def _loss_of(self, batch: Packed) -> Tensor: ...  # scalar


class ReferenceEngine(Engine):
    """Autograd through the plain decoder."""

    def __init__(
        self, decoder: Decoder, recompute_layers: int = 0, *, torch_compile: bool = False
    ) -> None:
        self.decoder, self.device = decoder, decoder.device
        self.device_name = str(decoder.device)
        self.num_layers, self.recompute_layers = len(decoder.layers), recompute_layers
        self.choices = {"engine": "reference: plain torch under autograd"}
        refusal = compile_refusal(decoder.device, torch_compile)
        if not refusal:
            compile_layers(decoder)
        self.choices["torch_compile"] = refusal or "every layer, during the first step"

    @property
    def recompute_layers(self) -> int:
        return self.decoder.recompute_layers

    @recompute_layers.setter
    def recompute_layers(self, number: int) -> None:
        self.decoder.recompute_layers = number

    def _loss_and_gradients(
        self, batch: Packed, dropout: ops.Dropout | None, weight: float
    ) -> Tensor:  # scalar
        # As gradients that were cleared: zeros, whichever micro-batch of a step is the first here.
        for parameter in self.decoder.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        loss = self._loss_sum(batch, dropout) * weight
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def _loss_of(self, batch: Packed) -> Tensor:  # scalar
        return self._loss_sum(batch, None)

    def _loss_sum(self, batch: Packed, dropout: ops.Dropout | None) -> Tensor:
        """Returns: scalar."""
        hidden = self.decoder(
            batch.input_ids, batch.position_ids, batch.cu_seqlens, dropout
        )  # [T, D]
        return self.decoder.loss_sum(hidden, batch.labels, batch.target_positions, dropout)


# To call a compiled function takes the host longer than the launches that it saves; measured in
# benchmarks/results/gpu.md.
SLOWER_COMPILED = "not used: compiled, a step took 1.02 to 1.5 times as long on an H200"


def choose_backend(
    device: torch.device, dtype: torch.dtype, torch_compile: bool
) -> tuple[Backend, dict[str, str]]:
    """What the fused layers are computed with on a device, and each choice with its reason."""
    gemm, why = choose_gemm(device, dtype)
    if dtype == torch.float32 and multiplies_bf16(device):
        why += (
            "; this processor multiplies bf16 too: --precision bf16 takes half the memory, and on"
            " wide models less time"
        )
    if dtype == torch.bfloat16 and emulates_bf16(device):
        why += "; this processor only emulates bf16, many times slower than fp32"
    attention = choose_attention(device, dtype)
    refusal = compile_refusal(device, torch_compile) if device.type != "cuda" else SLOWER_COMPILED
    if not torch_compile:
        refusal = "off, as asked"
    choices = {
        "engine": "fused: one product for the weights that share an input, adapters inside it,"
        " backward by hand",
        "products": f"{gemm.name} ({why})",
        "attention": attention.name,
        "torch_compile": refusal
        or "the work between the products, once for all layers, during the first step",
    }
    kernels = Kernels(None if refusal else "inductor")
    return Backend(gemm, attention, kernels, Scratch()), choices


class FusedEngine(Engine):
    """Layers with a backward by hand.

    Args:
        decoder: with its adapter attached; its linear layers are widened here (see fused.py).
        dropout_rate: of the adapter.
        recompute_layers: how many layers, from the lowest, keep their input only. The lowest come
            last in the backward, when the memory of the others is free again.
        torch_compile: compile the work between the products, where that is dependable and pays:
            so far nowhere; `use_kernels` takes compiled ones all the same.
        keep_freed: on a CPU, keep freed buffers for the next of their kind: faster, but fragmented
            memory takes up to a sixth more.
    """

    def __init__(
        self,
        decoder: Decoder,
        dropout_rate: float,
        recompute_layers: int = 0,
        *,
        torch_compile: bool = False,
        keep_freed: bool = True,
    ) -> None:
        limit_product_caches()
        if decoder.device.type == "cpu":
            if keep_freed:
                keep_freed_memory()
            else:
                stop_keeping_freed_memory()
        self.decoder, self.device = decoder, decoder.device
        self.device_name = str(decoder.device)
        self.num_layers, self.recompute_layers = len(decoder.layers), recompute_layers
        backend, self.choices = choose_backend(decoder.device, decoder.dtype, torch_compile)
        self.layers: list[FusedLayer] = []
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            fused_layer = FUSED_LAYERS[decoder.config.model_type]
            self.layers.append(fused_layer(layer, backend, dropout_rate))
        if decoder.residence is not None:
            self.choices["weights of the layers"] = decoder.residence.in_words
        self.final_norm = FusedNorm(decoder.final_norm, backend)
        self.head = WidenedLinear(decoder.lm_head, backend, dropout_rate)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # Weights were replaced by wider ones, one after the other.
        self._versions: list[int] = []  # of A and B of every pair, as they are in the products
        adapted = [index for index, layer in enumerate(self.layers) if layer.is_adapted]
        # Below the lowest adapter nothing is kept and nothing goes back.
        self.lowest = min(adapted, default=len(self.layers))
        if decoder.embed_tokens.lora is not None:
            self.lowest = 0
        if self.device.type == "cuda":
            self._choose_kernels()

    def _loss_and_gradients(
        self, batch: Packed, dropout: ops.Dropout | None, weight: float
    ) -> Tensor:  # scalar
        # Before the layers: memory of the last step, the adapter's new numbers, padding.
        begins_step = self._begins_step()
        if self.device.type == "cpu" and begins_step:
            release_freed_memory()
        with torch.no_grad():
            self._refresh(always=begins_step)
            prepare_gradients(self._linears())
        embedding = self.decoder.embed_tokens
        padded = pad(batch, dropout, self.device)

        # The embedding, alone under autograd: its adapter's backward is the last step below.
        with torch.set_grad_enabled(embedding.lora is not None):
            embedded = embedding(padded.input_ids)  # [T, D]

        with torch.no_grad():
            # Forward, and the loss with its own backward in one pass.
            shared = self._shared(padded)
            hidden, kept = self._forward(embedded.detach(), padded.rows, shared)  # [N, D]
            keys = shared.keys_of(padded.rows)  # [N]
            loss, grad = self._loss(hidden, padded.targets, keys, weight)  # scalar, [N, D]
            del hidden

            # Backward through the layers, from the top; what a layer kept is freed after it.
            for index in reversed(range(self.lowest, len(self.layers))):
                layer, saved = self.layers[index], kept.pop()
                if index < self.recompute_layers:
                    _, saved = layer.forward(saved.x, shared, saved.rows, for_backward_only=True)
                needs_input = index > self.lowest or embedding.lora is not None
                below = layer.backward(grad, saved, shared, needs_input=needs_input)  # [T, D]
                del saved
                if below is not None:
                    grad = below
        if embedding.lora is not None:
            torch.autograd.backward(embedded, grad)
        return loss

    @torch.no_grad()
    def _loss_of(self, batch: Packed) -> Tensor:  # scalar
        self._refresh()
        padded = pad(batch, None, self.device)
        shared = self._shared(padded)
        embedded = self.decoder.embed_tokens(padded.input_ids)  # [T, D]
        hidden, _ = self._forward(embedded, padded.rows, shared, keep=False)
        return self._loss(hidden, padded.targets, None, None)[0]

    def _shared(self, batch: Padded) -> Shared:
        lengths = [stop - start for start, stop in itertools.pairwise(batch.cu_seqlens)]
        rotary = self.decoder.rotary(batch.position_ids, lengths, lengths)
        return Shared(rotary, batch.cu_seqlens, batch.row_keys)

    def _forward(
        self, x: Tensor, last_rows: Tensor, shared: Shared, *, keep: bool = True
    ) -> tuple[Tensor, list[Saved]]:
        """x: [T, D], last_rows: [N]. Returns: hidden states of these rows [N, D], what is kept."""
        kept: list[Saved] = []
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            rows = last_rows if is_last else None
            out, saved = layer.forward(x, shared, rows)
            if keep and index >= self.lowest:
                kept.append(Saved(x, rows) if index < self.recompute_layers else saved)
            del saved
            x = out
        return x, kept

    def _loss(
        self, hidden: Tensor, targets: Tensor, row_keys: Tensor | None, weight: float | None
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and in the same pass its gradient, a few rows of logits at a time.

        Args:
            hidden: [N, D], before the final norm; overwritten with the gradient.
            targets: one for each row that is no padding.
            row_keys: [N] of the dropout, None without.
            weight: of the loss; None for the loss alone.

        Returns: the weighted loss, and its gradient with respect to `hidden` [N, D].
        """
        wide_dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide_dtype)
        rows = architecture.loss_chunk_rows(self.decoder.config.vocab_size, hidden.device.type)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, min(start + rows, len(hidden)))
            keys = None if row_keys is None else row_keys[chunk]
            total += self._loss_of_chunk(hidden[chunk], targets[chunk], keys, weight)
        return total, hidden

    def _loss_of_chunk(
        self, hidden: Tensor, targets: Tensor, row_keys: Tensor | None, weight: float | None
    ) -> Tensor:
        """As `_loss`, of a few rows: hidden [n, D], row_keys [n]. Returns: scalar."""
        head, norm, kernels = self.head, self.final_norm, self.head.kernels

        # Forward: final norm, head, loss.
        wide, low, stats = kernels.widen(head, hidden, norm, row_keys)  # [n, D + X], [n, X]
        logits = head.forward(wide)  # [n, V], the largest tensor there is
        del wide
        loss = kernels.cross_entropy_(logits[: len(targets)], targets, weight)
        if weight is None:
            return loss

        # Backward: the logits hold their gradient now.
        logits[len(targets) :] = 0.0  # Padding has none.
        wide = head.backward(logits, low)  # [n, D + X]
        del logits
        kernels.norm_backward(head, wide, hidden, norm, row_keys, stats, hidden, adds=False)
        return loss * weight

    def _choose_kernels(self) -> None:
        """Takes Triton's kernels where they run; they leave nothing to compile."""
        if self.device.index is not None and torch.cuda.is_available():
            torch.cuda.set_device(self.device)  # Triton starts kernels on the current one.
        layer = max(self.layers, key=FusedLayer.extra_columns)
        kernels, why = choose_kernels(layer, self.head, self.final_norm)
        self.choices["kernels"] = f"{(kernels or Kernels).name} ({why})"
        if kernels is not None:
            self.use_kernels(kernels)
            self.choices["torch_compile"] = "not used: Triton's kernels are compiled already"

    def use_kernels(self, kernels: Kernels) -> None:
        """Replaces the kernels that were chosen, to compare them."""
        self.final_norm.kernels = kernels
        for linear in self._linears():
            linear.kernels = kernels
        for layer in self.layers:
            layer.kernels = kernels
            for norm in layer.norms.values():
                norm.kernels = kernels

    def _refresh(self, *, always: bool = False) -> None:
        """Copies the adapters' current numbers into the products, where they may be others.

        What changes them counts up their versions, a loader as well as `state.build_adamw`'s
        optimizer; and the first micro-batch of a step copies always.
        """
        parameters = [
            parameter
            for linear in self._linears()
            for pair in linear.pairs
            for parameter in (pair.lora_A, pair.lora_B)
        ]
        versions = [parameter._version for parameter in parameters]
        if always or versions != self._versions:
            refresh(self._linears())
            self._versions = versions

    def _begins_step(self) -> bool:
        """Whether the gradients were cleared and nothing was added since."""
        pairs = [pair for linear in self._linears() for pair in linear.pairs]
        return any(pair.lora_B.grad is None for pair in pairs)

    def _linears(self) -> Sequence[WidenedLinear]:
        return [linear for layer in self.layers for linear in layer.linears.values()] + [self.head]
