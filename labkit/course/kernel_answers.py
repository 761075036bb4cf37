"""Answers to the three kernel puzzles of notebook 01, right ones of several forms and mistakes that people make.

The course's tests run them all: a check must accept any kernel that is right, and name what is wrong with the others.
"""

from labkit.kernels.language import tl, triton


@triton.jit
def scale_right(x, s, y, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + row * V + v, tl.load(s + row) * tl.load(x + row * V + v, mask=v < V), mask=v < V)


@triton.jit
def scale_by_the_first_program(x, s, y, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if tl.program_id(1) == 0:
        factor = tl.load(s + row)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            tl.store(y + row * V + v, factor * tl.load(x + row * V + v, mask=v < V, other=0.0), v < V)


@triton.jit
def scale_without_mask(x, s, y, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + row * V + v, tl.load(s + row) * tl.load(x + row * V + v))


@triton.jit
def scale_first_block(x, s, y, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    v = tl.arange(0, BLOCK)
    tl.store(y + row * V + v, tl.load(s + row) * tl.load(x + row * V + v, mask=v < V), mask=v < V)


@triton.jit
def scale_into_the_next_row(x, s, y, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    place = row * V + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tl.num_programs(0) * V
    tl.store(y + place, tl.load(s + row) * tl.load(x + place, mask=inside), mask=inside)


@triton.jit
def scale_addresses(x, s, y, V, BLOCK: tl.constexpr):
    tl.store(y, s * x)


@triton.jit
def hits_right(x, target, hit, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    ours = tl.load(x + row * V + tl.load(target + row))
    best = float("-inf")
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.max(tl.load(x + row * V + v, mask=v < V, other=float("-inf")), 0))
    tl.store(hit + row, tl.where(ours >= best, 1.0, 0.0))


@triton.jit
def hits_by_counting(x, target, hit, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    ours = tl.load(x + row * V + tl.load(target + row))
    larger = 0
    for start in range(0, V, 2 * BLOCK):
        v = start + tl.arange(0, 2 * BLOCK)
        z = tl.load(x + row * V + v, mask=v < V, other=float("-inf"))
        larger += tl.sum(tl.where(z > ours, 1, 0), 0)
    tl.store(hit + row, larger == 0)


@triton.jit
def hits_read_twice(x, target, hit, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    best = float("-inf")
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.max(tl.load(x + row * V + v, mask=v < V, other=float("-inf")), 0))
    found = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * V + v, mask=v < V, other=float("-inf"))
        found += tl.sum(tl.where((z == best) & (v == tl.load(target + row)), 1.0, 0.0), 0)
    tl.store(hit + row, found)


@triton.jit
def hits_other_zero(x, target, hit, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    best = float("-inf")
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.max(tl.load(x + row * V + v, mask=v < V, other=0.0), 0))
    tl.store(hit + row, tl.where(tl.load(x + row * V + tl.load(target + row)) >= best, 1.0, 0.0))


@triton.jit
def entropy_right(x, entropy, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m = float("-inf")
    s = 0.0
    w = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * V + v, mask=v < V, other=float("-inf"))
        new = tl.maximum(m, tl.max(z, 0))
        moved = tl.where(s > 0, m - new, 0.0)
        d = tl.where(v < V, z - new, 0.0)
        e = tl.where(v < V, tl.exp(d), 0.0)
        w = tl.exp(m - new) * (w + moved * s) + tl.sum(e * d, 0)
        s = tl.exp(m - new) * s + tl.sum(e, 0)
        m = new
    tl.store(entropy + row, tl.log(s) - w / s)


@triton.jit
def entropy_from_a_low_start(x, entropy, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m = -1e30
    s = 0.0
    w = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * V + v, mask=v < V, other=-1e30)
        new = tl.maximum(m, tl.max(z, 0))
        keep = tl.exp(m - new)
        e = tl.exp(z - new)
        w = keep * (w + (m - new) * s) + tl.sum(e * (z - new), 0)
        s = keep * s + tl.sum(e, 0)
        m = new
    tl.store(entropy + row, tl.log(s) - w / s)


@triton.jit
def entropy_without_guards(x, entropy, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m = float("-inf")
    s = 0.0
    w = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * V + v, mask=v < V, other=float("-inf"))
        new = tl.maximum(m, tl.max(z, 0))
        e = tl.exp(z - new)
        w = tl.exp(m - new) * (w + (m - new) * s) + tl.sum(e * (z - new), 0)
        s = tl.exp(m - new) * s + tl.sum(e, 0)
        m = new
    tl.store(entropy + row, tl.log(s) - w / s)


@triton.jit
def entropy_from_large_products(x, entropy, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m = float("-inf")
    s = 0.0
    u = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * V + v, mask=v < V, other=float("-inf"))
        new = tl.maximum(m, tl.max(z, 0))
        e = tl.exp(z - new)
        u = tl.exp(m - new) * u + tl.sum(tl.where(v < V, e * z, 0.0), 0)
        s = tl.exp(m - new) * s + tl.sum(e, 0)
        m = new
    tl.store(entropy + row, m + tl.log(s) - u / s)


@triton.jit
def entropy_forgets_the_shift(x, entropy, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m = -1e30
    s = 0.0
    w = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * V + v, mask=v < V, other=-1e30)
        new = tl.maximum(m, tl.max(z, 0))
        e = tl.exp(z - new)
        w = tl.exp(m - new) * w + tl.sum(e * (z - new), 0)
        s = tl.exp(m - new) * s + tl.sum(e, 0)
        m = new
    tl.store(entropy + row, tl.log(s) - w / s)


@triton.jit
def entropy_two_reads(x, entropy, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m = float("-inf")
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        m = tl.maximum(m, tl.max(tl.load(x + row * V + v, mask=v < V, other=float("-inf")), 0))
    s = 0.0
    w = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        d = tl.where(v < V, tl.load(x + row * V + v, mask=v < V, other=0.0) - m, 0.0)
        e = tl.where(v < V, tl.exp(d), 0.0)
        s += tl.sum(e, 0)
        w += tl.sum(e * d, 0)
    tl.store(entropy + row, tl.log(s) - w / s)
