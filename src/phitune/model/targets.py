"""Which modules get an adapter: short names, presets and layers to full module names.

A name that the model does not have is refused with the one that does its work there. Presets are
those of `architecture.FAMILIES`; LoRA itself is in lora.py. Nothing here loads torch.
"""

from collections.abc import Sequence

from phitune.errors import SettingsError, listing
from phitune.model.architecture import EMBED_TOKENS, FAMILIES, LM_HEAD, ModelConfig, layer_linears

EMBEDDING_MODULE = "model.embed_tokens"


def resolve_targets(
    config: ModelConfig, target_modules: Sequence[str], layers: str | None
) -> tuple[str, ...]:
    """Full names of the modules that get an adapter.

    Args:
        target_modules: short names (q_proj), presets (attention, mlp, all-linear), and embed_tokens
            or lm_head.
        layers: such as "16-31"; restricts the modules of layers, not embed_tokens and lm_head.

    Raises:
        SettingsError: a name that this model does not have, or a layer beyond the last.
    """
    family = FAMILIES[config.model_type]
    presets = {
        "attention": family.attention,
        "mlp": family.mlp,
        "all-linear": family.all_linear,
    }
    wanted: set[str] = set()
    problems = []
    for name in target_modules:
        if name in presets:
            wanted.update(presets[name])
        elif name in (*family.all_linear, EMBED_TOKENS, LM_HEAD):
            wanted.add(name)
        else:
            instead = family.foreign.get(name)
            hint = f" (its work is done by {instead} here)" if instead else ""
            problems.append(f"{name}: this model has no such module{hint}")
    if problems:
        raise SettingsError(
            f"target_modules:\n{listing(problems)}\n"
            f"A {config.model_type} model has {' '.join(family.all_linear)} in each layer, and"
            f" {EMBED_TOKENS} and {LM_HEAD};\npresets are {', '.join(presets)}."
        )
    chosen = resolve_layers(config, layers)
    modules = [EMBEDDING_MODULE] if EMBED_TOKENS in wanted else []
    for index in chosen:
        for spec in layer_linears(config).values():
            for name, _ in spec.parts:
                if name.rsplit(".", 1)[-1] in wanted:
                    modules.append(f"model.layers.{index}.{name}")
    if LM_HEAD in wanted:
        modules.append(LM_HEAD)
    return tuple(modules)


def resolve_layers(config: ModelConfig, layers: str | None) -> list[int]:
    """ "16-31" or "0,2,8-11" as sorted layer indices; None means all of them.

    Raises:
        SettingsError: an index beyond the last layer, or a range that runs backwards.
    """
    last = config.num_hidden_layers - 1
    if layers is None:
        return list(range(last + 1))
    chosen: set[int] = set()
    for part in layers.split(","):
        first_text, _, last_text = part.partition("-")
        first = int(first_text)
        stop = int(last_text or first_text)
        if first > stop or stop > last:
            raise SettingsError(
                f"layers = {layers!r}: {part.strip()} is not a range of this model's layers,"
                f" which are 0 to {last}"
            )
        chosen.update(range(first, stop + 1))
    return sorted(chosen)
