#!/bin/bash
# Packed batches in the backward pass: build, corners, timings. Repository root; <= 90 s.
# FA3_SO: FlashAttention-3's library, for its timings.
set -u
OUT=${OUT:-/tmp/vbw_out}; mkdir -p $OUT
W=$(mktemp -d)
cat > $W/build.py <<'PY'
import os, re, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
d, tree, pattern = sys.argv[1:]
os.makedirs(d, exist_ok=True)
cut = subprocess.check_output(["python3","-c","import importlib.util as u;print(u.find_spec('cutlass_library').submodule_search_locations[0])"],text=True).strip()+"/source/include"
NV = ["nvcc","-std=c++17","-O3","-gencode","arch=compute_90a,code=sm_90a","-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED","-DNDEBUG","--expt-relaxed-constexpr","--use_fast_math","-Xptxas","-v","-Xcompiler=-fPIC,-fvisibility=hidden",'-DHOPPER_ATTENTION_VERSION="lab"',"-isystem",cut,f"-I{tree}/include",f"-I{tree}/hopper","-I",d]
want = re.compile(pattern)
rows = [l.strip() for l in open(f"{tree}/hopper/backward/instances.def") if l.startswith("HOPPER")]
rows = [r for r in rows if want.fullmatch(re.match(r"\w+\((\w+),", r).group(1))]
open(f"{d}/compiled_backward_instances.def","w").write("\n".join(rows)+"\n")
open(f"{d}/compiled_instances.def","w").write("\n")
jobs = []
for r in rows:
    m = re.match(r"\w+\((\w+), (.*)\)", r); n = m.group(1)
    open(f"{d}/{n}.cu","w").write(f'#include "backward/instance.cuh"\nHOPPER_ATTENTION_DEFINE_BACKWARD({n}, {m.group(2)})\n')
    jobs.append((n, f"{d}/{n}.cu", f"{d}/{n}.o"))
files = [os.path.join(p, f) for p, _, fs in os.walk(f"{tree}/hopper") for f in fs if f.endswith((".cpp", ".cu")) and "/quantize" not in p]
jobs += [(f, f, f"{d}/{f.replace('/','_').replace('.','_')}.o") for f in files]
def run(j):
    t = time.time(); r = subprocess.run(NV+["-c",j[1],"-o",j[2]], capture_output=True, text=True); x = r.stdout+r.stderr
    info = [l.strip() for l in x.splitlines() if re.search(r"error|warning|spill|C7\d\d\d", l)]
    return j[0], r.returncode, [l for l in info if "0 bytes spill stores" not in l], time.time()-t
bad = 0
with ThreadPoolExecutor(16) as ex:
    for n, rc, info, t in ex.map(run, jobs):
        bad |= rc
        if rc or info: print("build", n, rc, f"{t:.0f}s", *info[:3], sep=" | ", flush=True)
if bad: sys.exit(1)
sys.exit(subprocess.run(["nvcc","-shared","-o",f"{d}/lab.so",*[j[2] for j in jobs],"-cudart","static"]).returncode)
PY
cat > $W/lab.py <<'PY'
import ctypes as C, math, os, sys
import torch
I64, I32, F, P = C.c_int64, C.c_int32, C.c_float, C.c_void_p
T = ["q", "k", "v", "out", "dout", "dq", "dk", "dv"]
INF = math.inf
class Args(C.Structure):
    _fields_ = ([("struct_size", C.c_uint64)] + [(n, P) for n in ("q","k","v","out","dout","lse","dlse","dq","dk","dv")]
      + [(f"{n}_stride_{x}", I64) for n in T for x in ("batch","seq","head")]
      + [(n, I32) for n in ("dtype","batch","seqlen_q","seqlen_k","heads","heads_kv","head_dim","head_dim_v")]
      + [("softmax_scale", F), ("softcap", F)] + [(n, I32) for n in ("causal","window_left","window_right","deterministic")]
      + [("workspace", P), ("stream", P), ("sink", P), ("dsink", P), ("packed", I32)] + [(n, P) for n in ("cu_seqlens_q","cu_seqlens_k","seqused_q","seqused_k")])
def library(path):
    lib = C.CDLL(path); lib.hopper_attention_last_error.restype = C.c_char_p; return lib
NEW = library(sys.argv[1])
def call(q, k, v, out, dout, lse, dq, dk, dv, cu=None, used=(None, None), dlse=None, causal=False, window=(-1, -1), softcap=0.0, det=False, L=NEW):
    """A launcher. cu: (cu_seqlens_q, cu_seqlens_k) of a packed batch, else dense."""
    a = Args(); a.struct_size = C.sizeof(Args); a.packed = cu is not None
    t = dict(zip(T, (q, k, v, out, dout, dq, dk, dv)))
    for n, x in t.items():
        setattr(a, n, x.data_ptr() if x.numel() else None)
        st = (0, *x.stride()) if cu else x.stride()
        for i, y in enumerate(("batch", "seq", "head")): setattr(a, f"{n}_stride_{y}", st[i])
    a.lse = lse.data_ptr() if lse.numel() else None; a.dlse = dlse.data_ptr() if dlse is not None else None
    a.dtype = 1 if q.dtype == torch.bfloat16 else 0
    a.seqlen_q, a.heads, a.head_dim = q.shape[-3:]; a.seqlen_k, a.heads_kv = k.shape[-3:-1]; a.head_dim_v = v.shape[-1]
    a.softmax_scale = q.shape[-1] ** -0.5; a.softcap = softcap; a.causal = causal; a.window_left, a.window_right = window; a.deterministic = det
    if cu:
        a.batch = cu[0].numel() - 1; a.cu_seqlens_q, a.cu_seqlens_k = (x.data_ptr() for x in cu)
        a.seqused_q, a.seqused_k = (x.data_ptr() if x is not None else None for x in used)
    else: a.batch, a.struct_size = q.shape[0], Args.packed.offset
    n = C.c_uint64()
    if L.hopper_attention_backward_workspace_bytes(C.byref(a), C.byref(n)): raise RuntimeError(L.hopper_attention_last_error().decode())
    w = torch.full((max(n.value, 128),), 255, dtype=torch.uint8, device="cuda"); a.workspace = w.data_ptr()
    def run():
        a.stream = torch.cuda.current_stream().cuda_stream
        if L.hopper_attention_backward(C.byref(a)): raise RuntimeError(L.hopper_attention_last_error().decode())
    run.keep = (t, w, lse, dlse, cu, used)
    return run
def sums(lens): return torch.tensor([0, *torch.tensor(lens, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
class Batch:
    def __init__(self, d, lq, lk, uq=None, uk=None, h=4, hkv=2, dv=None, tail=0, causal=False, window=(-1, -1), softcap=0.0, dt=torch.bfloat16, dlse=False, seed=1):
        dv = dv or d; self.lq, self.lk = lq, lk; self.uq, self.uk = uq or lq, uk or lk
        self.cu = (sums(lq), sums(lk)); i32 = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")
        self.used = (i32(uq) if uq else None, i32(uk) if uk else None)
        tq, tk = sum(lq) + tail, sum(lk) + tail; g = torch.Generator("cuda").manual_seed(seed)
        r = lambda *s: torch.randn(s, device="cuda", dtype=dt, generator=g)
        self.q, self.k, self.v, self.do = r(tq, h, d), r(tk, hkv, d), r(tk, hkv, dv), r(tq, h, dv)
        self.opt = dict(causal=causal, window=window, softcap=softcap)
        seq = lambda ls, n: torch.cat([torch.repeat_interleave(torch.arange(len(ls), device="cuda"), torch.tensor(ls, device="cuda", dtype=torch.long)), torch.full((tail,), -1, device="cuda")])
        pos = lambda ls: torch.cat([*[torch.arange(x, device="cuda") for x in ls], torch.zeros(tail, device="cuda", dtype=torch.long)])
        self.sq, self.sk = seq(lq, tq), seq(lk, tk); pq, pk = pos(lq), pos(lk)
        nq, nk = (torch.tensor([*x, 0], device="cuda") for x in (self.uq, self.uk))
        self.useq, self.usek = pq < nq[self.sq], pk < nk[self.sk]
        l, rr = window; rr = 0 if causal else rr
        i = (pq + nk[self.sq] - nq[self.sq])[:, None]; j = pk[None]
        see = (self.sq[:, None] == self.sk[None]) & self.useq[:, None] & self.usek[None]
        if l >= 0: see &= j >= i - l
        if rr >= 0: see &= j <= i + rr
        self.see = see
        self.dlse = torch.randn(h, tq, device="cuda", generator=g) if dlse else None
        self.want, o, self.lse = self.grads(torch.float64); self.usual, _, _ = self.grads(dt)
        self.out = o.to(dt); self.lse = self.lse.float().contiguous()
    def grads(self, dtype):
        x = [t.detach().to(dtype).requires_grad_() for t in (self.q, self.k, self.v)]
        n = self.q.shape[1] // self.k.shape[1]; k, v = (t.repeat_interleave(n, 1) for t in x[1:])
        s = torch.einsum("qhd,khd->hqk", x[0], k) * self.q.shape[-1] ** -0.5; cap = self.opt["softcap"]
        if cap: s = cap * torch.tanh(s / cap)
        s = (s if dtype == torch.float64 else s.float()).masked_fill(~self.see, -INF)
        lse = torch.logsumexp(s, 2) if s.shape[2] else torch.full(s.shape[:2], -INF, device="cuda", dtype=s.dtype)
        none = lse == -INF
        p = torch.exp(s - lse.masked_fill(none, 0)[..., None]).to(dtype)
        o = torch.einsum("hqk,khd->qhd", p, v)
        outs, up = (o,), (self.do.to(dtype),)
        if self.dlse is not None: outs, up = (o, lse), (self.do.to(dtype), torch.where(none, 0, self.dlse.to(lse.dtype)))
        return [g.nan_to_num(0.0) for g in torch.autograd.grad(outs, x, up)], o.detach(), lse.detach()
    def inputs(self): return [self.q, self.k, self.v, self.out, self.do, self.lse]
    def run(self, det=False, inputs=None, strided=False, cu=None, times=1):
        q, k, v, out, do, lse = inputs or self.inputs()
        edge = 70; outs, bufs = [], []
        for x in (q, k, v):
            n, h, d = x.shape
            b = torch.full((n + 2 * edge, 3 if strided else 1, h, d), 7.0, device="cuda", dtype=x.dtype)
            view = b[edge:edge + n, -1 if not strided else 1]; view.fill_(math.nan); outs.append(view); bufs.append((b, edge, n))
        f = call(q, k, v, out, do, lse, *outs, cu=cu or self.cu, used=self.used, dlse=self.dlse, det=det, **self.opt)
        self.same = True
        f(); first = [x.clone() for x in outs]
        for _ in range(times - 1):
            f(); self.same &= all(torch.equal(a, b) for a, b in zip(first, outs))
        torch.cuda.synchronize()
        self.intact = True
        for (b, e, n), x in zip(bufs, outs):
            x.fill_(7.0); self.intact &= bool((b == 7.0).all())
        return first
    def errors(self, got, rows=None):
        """What is wrong, and the worst share of the allowed error. rows: (rows of q, rows of k) to look at."""
        text, worst = "", 0.0
        for n, a, w, u in zip(("dq", "dk", "dv"), got, self.want, self.usual):
            r = None if rows is None else rows[0 if n == "dq" else 1]
            if r is not None: a, w, u = a[r], w[r], u[r]
            if not w.numel(): continue
            e = (a.double() - w).abs(); allow = 2 * (u.double() - w).abs().max().item() + 1e-5
            worst = max(worst, e.max().item() / allow)
            if not e.max().item() <= allow:
                bad = (~(e <= allow)).any(-1).any(-1).nonzero()[:, 0]
                text += f" {n}: {bad.numel()} rows of {a.shape[0]} wrong, {bad[:3].tolist()}..{bad[-3:].tolist()} max {e.max().item():.1e}/{allow:.1e} nan {a.isnan().sum().item()};"
        for n, a, r in zip(("dq", "dk", "dv"), got, (~self.useq, ~self.usek, ~self.usek)):
            if rows is None and not bool((a[r] == 0).all()): text += f" {n}: unused rows are not zero;"
        if not self.intact: text += " canaries;"
        if not self.same: text += " bits differ;"
        return text, worst
failed, done = [], 0
def note(name, text, worst=0.0):
    global done; done += 1
    if text: failed.append(name); print(f"FAIL {name}:{text}", flush=True)
    return worst
LQ = [77, 0, 1, 300, 63, 64, 65, 0, 127, 128, 129, 5, 257, 31, 100]
LK = [90, 5, 1, 331, 64, 63, 127, 128, 129, 1, 200, 0, 255, 256, 100]
MODES = {"full": {}, "causal": {"causal": True}, "window": {"window": (70, 20)}, "causal_window": {"window": (50, 0), "causal": True}}
def corners(d, dv):
    tag = f"d{d}" if d == dv else f"d{d}x{dv}"; worst = 0
    for name, mode in MODES.items():
        b = Batch(d, LQ, LK, dv=dv, tail=37, dlse=name == "full", **mode)
        worst = max(worst, note(f"{tag}_{name}", *b.errors(b.run())))
        worst = max(worst, note(f"{tag}_{name}_det", *b.errors(b.run(det=True, times=20))))
    b = Batch(d, LQ, LK, dv=dv, h=3, hkv=3, causal=True)
    note(f"{tag}_mha_strided", *b.errors(b.run(strided=True)))
    b = Batch(d, LQ, LQ, dv=dv, h=6, hkv=1, causal=True, tail=3)
    note(f"{tag}_mqa", *b.errors(b.run(strided=True)))
    b = Batch(d - 8, LQ, LK, dv=dv - 8, causal=True); note(f"{tag}_less", *b.errors(b.run()))
    # used lengths, NaN in all that is not used
    uq = [max(0, x - y) for x, y in zip(LQ, [3, 0, 0, 70, 1, 64, 2, 0, 0, 1, 128, 5, 1, 9, 50])]
    uk = [max(0, x - y) for x, y in zip(LK, [9, 5, 0, 140, 1, 0, 63, 2, 1, 0, 72, 0, 250, 0, 99])]
    for name, mode in MODES.items():
        b = Batch(d, LQ, LK, uq, uk, dv=dv, tail=130, **mode)
        x = [t.clone() for t in b.inputs()]
        for t, r in ((x[0], ~b.useq), (x[1], ~b.usek), (x[2], ~b.usek), (x[3], ~b.useq), (x[4], ~b.useq)): t[r] = math.nan
        x[5][:, ~b.useq] = math.nan
        note(f"{tag}_used_{name}", *b.errors(b.run(inputs=x, det=name == "causal")))
    # isolation: every second sequence holds NaN or infinity; the others' bits do not change
    for name in ("full", "causal"):
        b = Batch(d, LQ, LK, dv=dv, tail=40, **MODES[name]); clean = b.run(det=True)
        for what in ("nan", "inf", "-inf"):
            for parity in (0, 1):
                for which in ((0,), (1,), (2,), (4,), (0, 1, 2, 3, 4, 5)):
                    x = [t.clone() for t in b.inputs()]
                    rq, rk = b.sq % 2 == parity, b.sk % 2 == parity  # -1 % 2 is 1
                    for i in which:
                        if i == 5: x[5][:, rq] = float(what)
                        else: x[i][rk if i in (1, 2) else rq] = float(what)
                    got = b.run(inputs=x, det=True)
                    same = torch.equal(got[0][~rq], clean[0][~rq]) and all(torch.equal(g[~rk], c[~rk]) for g, c in zip(got[1:], clean[1:]))
                    note(f"{tag}_isolation_{name}_{what}_{parity}_{which}", "" if same and b.intact else " leaks" + ("" if b.intact else " canaries"))
    return worst
def more():
    import random
    random.seed(0)
    lens = [random.randint(0, 3) for _ in range(2000)]; keys = [random.randint(0, 3) for _ in range(2000)]
    for name in ("full", "causal"):
        b = Batch(64, lens, keys, h=2, hkv=1, tail=5, **MODES[name]); note(f"2000_{name}", *b.errors(b.run())); note(f"2000_{name}_det", *b.errors(b.run(det=True, times=5)))
    b = Batch(128, [1] * 40, [1] * 40, causal=True); note("ones", *b.errors(b.run()))
    b = Batch(128, [2500], [2300], h=2, hkv=1, causal=True); note("single", *b.errors(b.run(det=True, times=10)))
    b = Batch(64, [1000, 0, 1500], [1700, 300, 900], h=8, hkv=2); note("few", *b.errors(b.run(det=True, times=10)))
    b = Batch(128, [1000, 17, 1500], [1700, 300, 900], h=2, hkv=2, window=(300, 100)); note("few_window", *b.errors(b.run(det=True, times=10)))
    b = Batch(128, LQ, LK, causal=True, dt=torch.float16); note("fp16", *b.errors(b.run()))
    for n, (lq, lk) in {"no_queries": ([0, 0], [40, 7]), "no_keys": ([40, 7], [0, 0]), "nothing": ([0], [0])}.items():
        for tail in (0, 9):
            b = Batch(64, lq, lk, tail=tail); note(f"{n}_{tail}", *b.errors(b.run()))
    b = Batch(64, [], [], tail=50); note("no_sequences", *b.errors(b.run()))
    # soft caps: packed and dense in the same kernels
    for d in (64, 128):
        b = Batch(d, LQ, LK, causal=True, softcap=5.0, tail=9); note(f"softcap_d{d}", *b.errors(b.run())); note(f"softcap_d{d}_det", *b.errors(b.run(det=True, times=5)))
        b = Batch(d, [333] * 3, [517] * 3, causal=True, softcap=5.0)
        view = lambda x: x.view(3, -1, *x.shape[1:])
        g = [torch.full_like(view(x), math.nan) for x in (b.q, b.k, b.v)]
        lse = b.lse.view(4, 3, 333).transpose(0, 1).contiguous()
        call(*(view(x) for x in (b.q, b.k, b.v, b.out, b.do)), lse, *g, **b.opt)(); torch.cuda.synchronize(); b.intact = b.same = True
        note(f"softcap_dense_d{d}", *b.errors([x.flatten(0, 1) for x in g]))
    for d in (64, 128, 256):
        b = Batch(d, [333] * 3, [517] * 3, causal=True)
        g = [torch.full_like(view(x), math.nan) for x in (b.q, b.k, b.v)]; lse = b.lse.view(4, 3, 333).transpose(0, 1).contiguous()
        call(*(view(x) for x in (b.q, b.k, b.v, b.out, b.do)), lse, *g, **b.opt)(); torch.cuda.synchronize(); b.intact = b.same = True
        note(f"dense_d{d}", *b.errors([x.flatten(0, 1) for x in g]))
    # a graph whose lengths change between its replays
    a = Batch(128, [300, 5, 129, 66], [300, 5, 129, 66], causal=True); b = Batch(128, [1, 250, 0, 249], [1, 250, 0, 249], causal=True)
    x = [t.clone() for t in a.inputs()]; cu = tuple(t.clone() for t in a.cu); outs = [torch.full_like(t, math.nan) for t in x[:3]]
    f = call(*x, *outs, cu=cu, causal=True); f(); torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): f()
    for y in (b, a, b):
        for t, s in zip((*x, *cu), (*y.inputs(), *y.cu)): t.copy_(s)
        [o.fill_(math.nan) for o in outs]; g.replay(); torch.cuda.synchronize(); y.intact = y.same = True
        note("graph", *y.errors(outs))
    # lengths that make no sense: nothing is touched outside, nothing hangs
    b = Batch(64, [100] * 8, [100] * 8, causal=True)
    for wrong in ([0, 800, 0, 800, 0, 800, 0, 800, 0], [0, -5, 10**9, 3, 2, 1, 800, 900, 5], [700, 600, 500, 400, 300, 200, 100, 50, 0], [-2**31, 2**31 - 1] * 4 + [0]):
        w = torch.tensor(wrong, dtype=torch.int32, device="cuda")
        for cu in ((w, w), (b.cu[0], w), (w, b.cu[1])):
            for det in (False, True): b.run(cu=cu, det=det); note("senseless", "" if b.intact else " canaries")
def bench(fs, reps=9):
    for f in fs: f(); f()
    ts = [[] for _ in fs]
    for _ in range(reps):
        for f, t in zip(fs, ts):
            a, e = torch.cuda.Event(True), torch.cuda.Event(True); a.record(); f(); e.record(); e.synchronize(); t.append(a.elapsed_time(e))
    return [sorted(t)[len(t) // 2] for t in ts]
def lognormal(total=29534, n=32):
    nd = torch.distributions.Normal(0.0, 1.0); x = torch.exp(nd.icdf((torch.arange(n).double() + 0.5) / n)); lens = (x / x.sum() * total).round().long().tolist()
    lens[-1] += total - sum(lens); p = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist(); return [lens[i] for i in p]
def timings():
    base = sys.argv[1].replace("/new/", "/base/"); base = library(base) if os.path.exists(base) else None
    fa3 = os.path.exists(os.environ.get("FA3_SO", ""))
    if fa3: torch.ops.load_library(os.environ["FA3_SO"])
    print("d  batch                 tokens: TFLOP/s packed packed-det | dense dense-det (before) | fa3 packed, det, dense | packed/dense packed/fa3")
    for d, h, hkv, name, lens in ((128, 32, 8, "16x1024", [1024] * 16), (128, 32, 8, "4x4096", [4096] * 4), (128, 32, 8, "2x8192", [8192] * 2), (128, 32, 8, "lognormal", lognormal()),
                                  (128, 32, 8, "64x256", [256] * 64), (128, 32, 8, "1024x16", [16] * 1024), (64, 32, 8, "16x1024", [1024] * 16), (64, 32, 8, "lognormal", lognormal()), (256, 8, 8, "4x4096", [4096] * 4), (256, 8, 2, "lognormal", lognormal())):
        t = sum(lens); r = lambda *s: torch.randn(s, device="cuda", dtype=torch.bfloat16)
        q, k, v, do, out = r(t, h, d), r(t, hkv, d), r(t, hkv, d), r(t, h, d), r(t, h, d) * 0.02
        lse = (torch.cat([torch.arange(1, n + 1) for n in lens]).cuda().float().log() + 0.5).expand(h, t).contiguous()
        g = [torch.empty_like(x) for x in (q, k, v)]; cu = sums(lens); fs, at = [], []
        for det in (False, True): fs.append(call(q, k, v, out, do, lse, *g, cu=(cu, cu), causal=True, det=det)); at.append(("packed", det))
        if len(set(lens)) == 1:
            n = len(lens); x = [y.view(n, -1, *y.shape[1:]) for y in (q, k, v, out, do)]; gx = [y.view(n, -1, *y.shape[1:]) for y in g]; ld = lse.view(h, n, -1).transpose(0, 1).contiguous()
            for det in (False, True): fs.append(call(*x, ld, *gx, causal=True, det=det)); at.append(("dense", det))
            if base:
                for det in (False, True) if d < 256 else (): fs.append(call(*x, ld, *gx, causal=True, det=det, L=base)); at.append(("base", det))
        if fa3:
            for det in (False, True):
                f = lambda det=det: torch.ops.flash_attn_3.bwd(do, q, k, v, out, lse, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=max(lens), max_seqlen_k=max(lens), softmax_scale=d ** -0.5, is_causal=True, deterministic=det)
                try: f(); torch.cuda.synchronize()
                except Exception as e: print("fa3:", str(e).splitlines()[0][:150]); continue
                fs.append(f); at.append(("fa3", det))
            if len(set(lens)) == 1:
                f = lambda: torch.ops.flash_attn_3.bwd(x[4], x[0], x[1], x[2], x[3], ld, softmax_scale=d ** -0.5, is_causal=True)
                try: f(); torch.cuda.synchronize(); fs.append(f); at.append(("fa3dense", False))
                except Exception as e: print("fa3:", str(e).splitlines()[0][:150])
        fl = sum(10 * h * n * n * d / 2 for n in lens) / 1e9; c = {a: fl / t for a, t in zip(at, bench(fs))}
        s = lambda *a: f"{c[a]:6.0f}" if a in c else "     -"
        ratio = lambda a: f"{c['packed', False] / c[a, False]:6.3f}" if (a, False) in c else "     -"
        print(f"{d:3d} {name:10s} {h}/{hkv} {t:6d}: {s('packed', False)} {s('packed', True)} | {s('dense', False)} {s('dense', True)} ({s('base', False)} {s('base', True)}) | {s('fa3', False)} {s('fa3', True)} {s('fa3dense', False)} | {ratio('dense')} {ratio('fa3')}", flush=True)
if sys.argv[2] == "time": timings()
else:
    try:
        if sys.argv[2] == "more": more()
        else:
            for n in sys.argv[2:]:
                d, dv = map(int, n.split("x")); print(f"corners d{d}x{dv}: at most {corners(d, dv):.2f} of the allowed error", flush=True)
    except Exception as e:
        failed.append("exception"); print("FAIL", type(e).__name__, str(e).splitlines()[0][:300], e.__traceback__.tb_lineno, flush=True)
    print(f"{' '.join(sys.argv[2:])}: {done} checks, {len(failed)} failed", flush=True); sys.exit(bool(failed))
PY
s=$SECONDS; if [ -d .dev/base ]; then python3 $W/build.py $W/base .dev/base 'bf16_d(64|128)_masked' & fi
python3 $W/build.py $W/new . 'bf16_\w+_packed|bf16_d(64|128|256)_masked|bf16_d(64|128)_capped|fp16_d128_packed' || { echo BUILD FAILED; exit 1; }; wait
echo "build: $((SECONDS - s)) s"; s=$SECONDS; bad=0
for g in "64x64 192x128" "128x128 96x96" "256x256 192x192" more; do
  (timeout -k 2 40 python3 $W/lab.py $W/new/lab.so $g > "$W/${g%% *}.txt" 2>&1; r=$?; [ $r = 0 ] || { echo "rc $r" >> "$W/${g%% *}.txt"; touch $W/bad; }) &
done; wait
for g in 64x64 128x128 256x256 more; do tail -n 9 $W/$g.txt | cut -c1-260; done
echo "checks: $((SECONDS - s)) s"; s=$SECONDS
timeout -k 2 25 python3 $W/lab.py $W/new/lab.so time 2>&1 | tail -n 20 || bad=1
cp $W/*.txt $OUT/ 2>/dev/null
echo "timings: $((SECONDS - s)) s"; [ ! -e $W/bad ] && [ $bad = 0 ] && echo ALL PASSED || { echo SOME FAILED; exit 1; }
