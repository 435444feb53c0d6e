"""Several adapters on one frozen decoder, for inference: each token is computed with its own.

All adapters of a linear layer are one pair of matrices, A below A and B beside B. A token's factors
are zero for the adapters that are not its own, so that a batch that mixes them (and the base model,
whose factors are all zero) is still two small products a layer:

    out = x W^T + b + (factors * x A^T) B^T

Shapes: T tokens, K adapters, X all their ranks on a layer together, D in, O out, V vocabulary.
"""

from collections.abc import Sequence

import torch

from phitune.model.decoder import Decoder
from phitune.model.linear import LoraBank
from phitune.model.lora import Adapter, detach
from phitune.model.targets import EMBEDDING_MODULE


class AdapterSet:
    """Puts adapters on a decoder side by side, in the place of what was attached there."""

    def __init__(self, decoder: Decoder, adapters: Sequence[Adapter]) -> None:
        detach(decoder)
        self.count = len(adapters)
        self._device = decoder.device
        self._banks: list[LoraBank] = []
        for linear in {id(found): found for found in decoder.fused_linears().values()}.values():
            outputs, width = linear.weight.shape
            pairs = [
                (index, adapter.pairs[module])
                for index, adapter in enumerate(adapters)
                for module in linear.columns
                if module in adapter.pairs
            ]
            if not pairs:
                continue
            rank = sum(pair.lora_A.shape[0] for _, pair in pairs)
            bank = LoraBank(
                linear.weight.new_zeros(rank, width),
                linear.weight.new_zeros(outputs, rank),
                linear.weight.new_zeros(self.count + 1, rank),
            )
            place = 0
            for index, pair in pairs:
                part = slice(place, place + pair.lora_A.shape[0])
                rows = slice(pair.columns.start, pair.columns.stop)
                bank.lora_A[part] = pair.lora_A.detach()
                bank.lora_B[rows, part] = pair.lora_B.detach()
                bank.factors[index, part] = pair.scaling
                place = part.stop
            linear.bank = bank
            self._banks.append(bank)
        self._put_on_embedding(decoder, adapters)

    def choose(self, choice: Sequence[int | None]) -> None:
        """Says which adapter each token of the coming forward passes is computed with.

        Args:
            choice: [T] numbers of adapters, None for the base model; or one for all tokens.
        """
        if all(index is None for index in choice):
            rows = None
        else:
            numbers = [self.count if index is None else index for index in choice]
            if len(set(numbers)) == 1:
                numbers = numbers[:1]
            rows = torch.tensor(numbers, device=self._device)
        for bank in self._banks:
            bank.choose(rows)

    def _put_on_embedding(self, decoder: Decoder, adapters: Sequence[Adapter]) -> None:
        table = decoder.embed_tokens.weight  # [V, D]
        pairs = [
            (index, adapter.pairs[EMBEDDING_MODULE])
            for index, adapter in enumerate(adapters)
            if EMBEDDING_MODULE in adapter.pairs
        ]
        if not pairs:
            return
        bank = LoraBank(
            torch.cat([pair.lora_A.detach() for _, pair in pairs]).to(table.dtype),
            torch.cat([pair.lora_B.detach() for _, pair in pairs], dim=1).to(table.dtype),
            table.new_zeros(self.count + 1, sum(pair.lora_A.shape[0] for _, pair in pairs)),
        )
        place = 0
        for index, pair in pairs:
            part = slice(place, place + pair.lora_A.shape[0])
            bank.factors[index, part] = pair.scaling
            place = part.stop
        decoder.embed_tokens.bank = bank
        self._banks.append(bank)
