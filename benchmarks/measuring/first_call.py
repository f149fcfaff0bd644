"""The process that ``benchmarks/cold_start.py`` times: imports, then the first calls.

Run it as ``python -m measuring.first_call OPTIONS``. OPTIONS is JSON with tokens, heads, kv_heads,
head_dim, dtype, selection, and started, which is the time when the process was started. The process
prints JSON.
"""

import argparse
import json
import sys
import time


def main():
    options = argparse.Namespace(**json.loads(sys.argv[1]))
    import torch

    torch_imported = time.time()
    import nsa  # noqa: F401 (its import is what is timed)

    nsa_imported = time.time()
    from measuring import workloads
    from measuring.timing import timed
    from measuring.variants import kernel_variants

    # The CUDA context is part of the first call.
    leading, config = (1, options.tokens), workloads.make_config(options)
    before = time.time()
    tensors = workloads.make_tensors(leading, options, backward=False)
    attention = workloads.nsa_attention(tensors, config)
    workloads.make_step(attention, tensors)()
    torch.cuda.synchronize()
    first_output = time.time()
    tensors = tensors._replace(dout=torch.randn_like(tensors.q))
    step = workloads.make_step(attention, tensors)
    step()
    torch.cuda.synchronize()
    first_gradient = time.time()
    result = dict(
        torch_s=torch_imported - options.started,
        nsa_s=nsa_imported - torch_imported,
        forward_s=first_output - before,
        output_s=first_output - options.started,
        backward_s=first_gradient - first_output,
        again_ms=timed(step),
        variants=sum(kernel_variants().values()),
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
