"""torch.compile of a model with the layer, and a CUDA graph captured with a Packing.

    python examples/compile_and_graph.py

With the fused backend (a Hopper GPU and the extra `fused`), one trace of the whole model serves all
lengths, and a CUDA graph removes the host's work from a step. Elsewhere the reference runs
uncompiled inside the compiled model, and the script says what it skips.
"""

import torch
from torch import Tensor, nn

import nsa

DIM, HEADS, KV_HEADS = 256, 4, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.attention = nsa.NativeSparseAttention(DIM, HEADS, KV_HEADS)

    def forward(self, x: Tensor, packing: nsa.Packing | None = None) -> Tensor:
        return x + self.attention(self.norm(x), packing)


def difference(a: Tensor, b: Tensor) -> str:
    return f"largest difference {(a - b).abs().max().item():.1e}"


@torch.no_grad()
def compile_it(model: nn.Module, draw, fused: bool):
    # The fused backend needs no graph break. Elsewhere this example skips code generation, because
    # that takes longer than everything else here. Keep the default backend for your own model.
    options = dict(fullgraph=True) if fused else dict(backend="eager")
    compiled = torch.compile(model, dynamic=True, **options)
    for length in (400, 300):
        x = draw(2, length)
        print(f"compiled, {length} tokens: {difference(compiled(x), model(x))}")


@torch.no_grad()
def capture_it(model: nn.Module, draw, cu_seqlens: Tensor):
    # Make the Packing before the capture, and keep it as long as the graph.
    packing = nsa.Packing(cu_seqlens)
    x = draw(int(cu_seqlens[-1]))
    # The first call compiles kernels, which a graph cannot capture. PyTorch requires a side stream.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(x, packing)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(x, packing)
    # A replay reads the current values of x, and writes to out.
    x.copy_(draw(*x.shape[:-1]))
    graph.replay()
    print(f"CUDA graph, {packing}: {difference(out, model(x, packing))}")


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = Block().to(device, dtype)

    def draw(*leading: int) -> Tensor:
        return torch.randn(*leading, DIM, device=device, dtype=dtype)

    q, kv = (draw(2, 400).unflatten(-1, (HEADS, -1))[:, :, :n] for n in (HEADS, KV_HEADS))
    reason = nsa.explain_backend(q, kv, kv)
    print(reason)
    fused = reason.startswith("backend: fused")
    compile_it(model, draw, fused)
    if fused:
        capture_it(model, draw, torch.tensor([0, 300, 301, 1000], dtype=torch.int32, device=device))
    else:
        print("skipped fullgraph=True, code generation and the CUDA graph: no fused backend here")


if __name__ == "__main__":
    main()
