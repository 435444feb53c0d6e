"""llama.cpp's server in a process of its own: a crash in it is an error here, not our end.

`python -m phitune.export.llama_process` reads what to load as a line of JSON, prints the server's
address as another, and ends when its input does.
"""

import json
import os
import sys


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    # What llama.cpp prints goes to the log; only our line to whoever started us.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    if asked["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["lora"], 1.0)]
    params.n_ctx = asked["context"]
    params.n_gpu_layers = 0
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    # Keys and values are f16 by default: one rounding more than the weights in the file have.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = False
    params.cache_ram_mib = 0
    params.warmup = False
    params.ui = False
    params.api_keys = [asked["key"]]  # Nobody else on this machine is answered.
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address}), file=out, flush=True)
    sys.stdin.read()
    os._exit(0)  # Its threads would wait for one another.


if __name__ == "__main__":
    main()
