"""`--format adapter`: the adapter alone, a clean folder as PEFT and servers load it."""

import torch

from phitune.errors import ExportError
from phitune.export.folder import check_room, check_texts, write_texts
from phitune.export.job import Export
from phitune.export.proof import (
    TIE,
    Proof,
    compare,
    fp32_tolerance,
    greedy_answers,
    logits_on,
    proof_prompts,
)
from phitune.model.adapters import AdapterSet
from phitune.model.lora import detach, load_adapter, save_adapter


def export(job: Export) -> Proof:
    """Writes the folder, loads it again, and has it answer beside the adapter it came from."""
    source = job.source
    check_room(job.destination, sum(p.nbytes for p in source.adapter.parameters()))
    save_adapter(source.adapter, job.destination, source.model_name)
    write_texts(source, job.destination, "adapter")

    served = job.served
    answers = greedy_answers(served, proof_prompts(source.run))
    check_texts(source, job.destination, answers)
    written = load_adapter(served.decoder, job.destination)
    detach(served.decoder)
    expected = source.adapter.tensors()
    if written.tensors().keys() != expected.keys() or not all(
        torch.equal(tensor.cpu(), expected[name]) for name, tensor in written.tensors().items()
    ):
        raise ExportError("the export was removed: its matrices are not those of the adapter")
    AdapterSet(served.decoder, [written]).choose([0])
    found = compare(answers, logits_on(served.decoder, answers), TIE)
    return Proof(
        "adapter",
        "the export, loaded again, beside the adapter in memory",
        len(answers),
        found.tokens,
        found.differing,
        found.ties,
        TIE,
        found.largest,
        fp32_tolerance(answers),
    )
