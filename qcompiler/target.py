"""What a backend can run, as data: kernel rows, and why a row declines a site.

A row exists only if a test ran that kernel. Fusing, planning, verifying and emitting read the same rows; a row's
``entry`` is the function that writes the kernel's node, its ``layout`` the lossless function from canonical codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qcompiler.dtypes import DType, dtype
from qcompiler.errors import InputError
from qcompiler.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something cannot be: a finding code (QC2xx ...), one sentence with the numbers, and what to do about it."""

    code: str
    message: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Phase:
    """A way a model is run: ``m`` is the number of rows (tokens x batch) that reach a linear layer."""

    name: str
    m: int


DECODE, PREFILL = Phase("decode", 1), Phase("prefill", 512)
PHASES = (DECODE, PREFILL)


@dataclass(frozen=True, slots=True)
class Request:
    """What a site asks of a kernel. ``n`` output features, ``k`` reduction length (rows and columns of a table).

    Where activations are codes: ``x`` is their scheme, ``y`` that of the result's codes (None: a float result), ``fn``
    the function of a ``q.apply``. ``traits`` are words for what only some kernels do (:mod:`qcompiler.requests`), and
    ``opset`` is the version of the model's default domain, 0 where unknown.
    """

    op: str
    scheme: Scheme
    n: int
    k: int
    activation: DType
    bias: bool = False
    x: Scheme | None = None
    y: Scheme | None = None
    fn: str = ""
    traits: frozenset[str] = frozenset()
    opset: int = 0


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One kernel: which requests it serves, on which chips, at which M, and how it is written down.

    ``codes`` are dtype names, ``groups`` the group sizes it takes, ``blocks`` the sizes of blocks, ``zeros`` the kinds
    of zero point, ``scales`` the types that scales are kept in (``float``: that of the weight), ``needs`` the chip
    features, ``m_max`` the largest M at which it does not materialise the dequantized weight (None: any), ``session``
    the runtime's session keys (name, value) without which the kernel is not taken.

    Where several kernels share an entry point, each serves M from ``m_min`` to ``m_max`` and ``hands_over`` what is
    above to the row of that name. ``epilogues`` are what it computes behind the product before it rounds: ``bias``,
    ``mul``, ``residual``, and functions; ``behind`` is the function ``module:name`` of the lowered graph that takes
    such ops into its calls, once all are written.

    Kernels that compute on codes of activations: ``x_codes`` and ``y_codes`` are the code types of the activation and
    of the result (``float`` among the latter: a float result), ``x_zeros`` the kinds of zero point of the activation,
    ``x_granularities`` what shares one of its scales (``x_blocks`` of which sizes); ``dynamic`` kernels choose the
    activation's parameters themselves. ``one_zero``: one zero point serves all channels.
    ``fns``: the functions of a ``q.apply``; ``traits``: what it does beyond the plain case; ``opset``: the oldest that
    has its node. ``slower``: (activation, M, share): from M rows on it reaches that share of the speed of the float op
    on the same activation, up to the M of the next entry; 1 or more is not slower.
    """

    name: str
    op: str
    codes: frozenset[str]
    granularities: frozenset[str]
    groups: frozenset[int]
    zeros: frozenset[str]
    activations: frozenset[str]
    entry: str
    layout: str
    numerics: str
    evidence: str
    needs: frozenset[str] = frozenset()
    n_multiple: int = 1
    k_multiple: int = 1
    m_max: int | None = None
    bias: bool = True
    rank: int = 0
    note: str = ""
    session: tuple[tuple[str, str], ...] = ()
    x_codes: frozenset[str] = frozenset()
    x_zeros: frozenset[str] = frozenset({"none", "int"})
    y_codes: frozenset[str] = frozenset()
    dynamic: bool = False
    one_zero: bool = False
    fns: frozenset[str] = frozenset()
    traits: frozenset[str] = frozenset()
    opset: int = 0
    slower: tuple[tuple[str, int, float], ...] = ()
    m_min: int = 1
    hands_over: str = ""
    x_granularities: frozenset[str] = frozenset({"tensor"})
    epilogues: frozenset[str] = frozenset()
    scales: frozenset[str] = frozenset({"float"})
    blocks: frozenset[tuple[int, int]] = frozenset()
    x_blocks: frozenset[tuple[int, int]] = frozenset()
    behind: str = ""

    def serves_rows(self, m: int) -> bool:
        """False where M rows are for another kernel of the same entry point."""
        return self.m_min <= m and not (self.hands_over and self.m_max is not None and m > self.m_max)

    def speed(self, activation: str, m: int) -> float | None:
        """Its speed as a share of the float op on the same ``activation`` at M rows, where it is the slower of the two.

        None where it is not, as far as was measured.
        """
        known = [(least, ratio) for name, least, ratio in self.slower if name == activation and m >= least]
        share = max(known)[1] if known else 1.0
        return share if share < 1 else None

    def why_not(self, request: Request, features: frozenset[str], m: int | None = None) -> list[Reason]:
        """Every reason why this row does not serve ``request`` at M rows; empty when it does."""
        out: list[Reason] = []
        s = request.scheme
        if s.dtype.name not in self.codes:
            known = ", ".join(sorted(self.codes))
            out.append(Reason("QC201", f"{self.name} takes {known} codes, not {s.dtype}", f"choose one of {known}"))
        if s.dynamic and not self.dynamic:
            out.append(Reason("QC201", f"{self.name} takes static weights, not {s}", "drop 'dynamic' for weights"))
        if s.granularity not in self.granularities:
            known = ", ".join(sorted(self.granularities))
            out.append(Reason("QC202", f"{self.name} scales per {known}, not per {s.granularity}", f"use {known}"))
        elif s.group_size is not None and s.group_size not in self.groups:
            known = ", ".join(map(str, sorted(self.groups)))
            out.append(Reason("QC202", f"{self.name} takes groups of {known}, not {s.group_size}", f"use g{known}"))
        elif s.granularity == "block" and s.group not in self.blocks:
            out.append(_blocks(self.name, "weights", s, self.blocks))
        if s.zero not in self.zeros:
            word = {"none": "symmetric codes", "int": "integer zero points", "float": "float zero points"}[s.zero]
            out.append(Reason("QC204", f"{self.name} does not take {word} without expanding the weight", "use 'sym'"))
        if (kept := "float" if s.scale is None else s.scale.name) not in self.scales:
            known = " or ".join(sorted(self.scales))
            out.append(Reason("QC202", f"{self.name} takes {known} scales, not {kept}", f"use {known} scales"))
        if request.activation.name not in self.activations:
            known = ", ".join(sorted(self.activations))
            fix = f"export the model in one of {known}"
            out.append(Reason("QC201", f"{self.name} takes {known} activations, not {request.activation}", fix))
        if request.n % self.n_multiple or request.k % self.k_multiple:
            law = f"N % {self.n_multiple} == 0 and K % {self.k_multiple} == 0"
            out.append(Reason("QC203", f"{self.name} needs {law}, got N={request.n} K={request.k}", "skip this site"))
        if min(request.n, request.k) < 1:
            out.append(Reason("QC203", f"{self.name} needs N and K of at least 1, got N={request.n} K={request.k}"))
        if request.bias and not self.bias:
            out.append(Reason("QC203", f"{self.name} has no bias input", "keep the bias as an Add of its own"))
        if missing := sorted(self.needs - features):
            chip = missing[-1] if missing[-1].startswith("sm_") else "avx2" if missing == ["avx2"] else "avx512vnni"
            fix = f"name a chip that has them, for example {self.name.partition('/')[0]}:{chip}"
            out.append(Reason("QC206", f"{self.name} needs {', '.join(missing)}, which this chip lacks", fix))
        if m is not None and not self.serves_rows(m):
            above = f"M up to {self.m_max}; {self.hands_over} takes more" if m >= self.m_min else f"M from {self.m_min}"
            out.append(Reason("QC203", f"{self.name} serves {above}; this phase has M={m}", "let M choose"))
        elif m is not None and self.m_max is not None and m > self.m_max:
            message = f"{self.name} expands the whole weight above M={self.m_max}; this phase has M={m}"
            out.append(Reason("QC104", message, "use a kernel that stays fused at this M, or leave the phase out"))
        return out + self._why_not_codes(request)

    def _why_not_codes(self, request: Request) -> list[Reason]:
        """The reasons that lie in the codes of activations and results, in traits and in the opset."""
        out: list[Reason] = []
        if self.fns and request.fn not in self.fns:
            known = ", ".join(sorted(self.fns))
            out.append(Reason("QC201", f"{self.name} computes {known}, not {request.fn}", "leave this op in float"))
        if request.x is not None:
            out += self._why_not_activation(request.x)
        if self.y_codes:
            asked = "float" if request.y is None else request.y.dtype.name
            if asked not in self.y_codes:
                gives = " or ".join(sorted(self.y_codes))
                out.append(Reason("QC201", f"{self.name} gives {gives} results, not {asked}", f"ask for {gives}"))
            if request.y is not None and (request.y.granularity != "tensor" or request.y.dynamic):
                message = f"{self.name} quantizes its result with one constant scale, not <{request.y}>"
                out.append(Reason("QC201", message, "quantize the result per tensor"))
        if self.one_zero and request.scheme.granularity != "tensor" and request.scheme.zero != "none":
            message = f"{self.name} takes one zero point for all channels, not one each"
            out.append(Reason("QC204", message, "use 'sym' for per-channel weights"))
        for trait in sorted(request.traits - self.traits):
            out.append(Reason("QC203", f"{self.name} does not do this: {trait}", "leave this op in float"))
        if 0 < request.opset < self.opset:
            message = f"{self.name} needs opset {self.opset}, the model has {request.opset}"
            out.append(Reason("QC207", message, f"export the model with opset {self.opset} or later"))
        return out

    def _nearest(self, x: Scheme) -> str:
        """The scheme of an activation that it takes, as near to ``x`` as may be."""
        name = x.dtype.name if x.dtype.name in self.x_codes else min(self.x_codes, default=x.dtype.name)
        per = next((g for g in ("tensor", "token") if g in self.x_granularities), "tensor")
        zero = "asym" if "int" in self.x_zeros and not dtype(name).is_float else "sym"
        return f"{name} {per} {zero}{' dynamic' if self.dynamic else ''}"

    def _why_not_activation(self, x: Scheme) -> list[Reason]:
        out: list[Reason] = []
        if x.granularity not in self.x_granularities:
            known = " or ".join(sorted(self.x_granularities))
            message = f"{self.name} scales activations per {known}, not per {x.granularity}"
            out.append(Reason("QC201", message, f"the nearest is '{self._nearest(x)}'"))
        elif x.granularity == "block" and x.group not in self.x_blocks:
            out.append(_blocks(self.name, "activations", x, self.x_blocks))
        if x.dynamic != self.dynamic:
            does, asks = ("dynamic", "static") if self.dynamic else ("static", "dynamic")
            fix = f"make activations {does}"
            out.append(Reason("QC201", f"{self.name} quantizes activations in the {does} way, not <{x}> ({asks})", fix))
        if x.dtype.name not in self.x_codes:
            known = " or ".join(sorted(self.x_codes)) or "float"
            out.append(Reason("QC201", f"{self.name} takes {known} activations, not {x.dtype}", f"use {known}"))
        elif x.zero not in self.x_zeros:
            word = {"none": "without a zero point", "int": "with a zero point", "float": "with a float zero point"}
            fix = f"use '{x.dtype} tensor {'asym' if 'int' in self.x_zeros else 'sym'}'"
            out.append(Reason("QC204", f"{self.name} does not take activations {word[x.zero]}", fix))
        return out


def _blocks(name: str, what: str, scheme: Scheme, known: Iterable[tuple[int, int]]) -> Reason:
    told = ", ".join(f"b{n}x{k}" for n, k in sorted(known)) or "no blocks"
    given = "x".join(map(str, scheme.group))
    return Reason("QC202", f"{name} scales {what} in {told}, not in b{given}", f"use {told}")


@dataclass(frozen=True, slots=True)
class Choice:
    """The rows that serve a request, one a phase, all written by the same entry point."""

    rows: tuple[tuple[Phase, KernelRow], ...]

    @property
    def row(self) -> KernelRow:
        return self.rows[0][1]

    def kernels(self) -> dict[str, str]:
        """Phase name -> row name."""
        return {phase.name: row.name for phase, row in self.rows}


@dataclass(frozen=True)
class Target:
    """A backend on a chip: ``rows`` are tried in order of ``rank`` (lowest first), ``features`` are the chip's.

    ``absent`` says of ops without any row why there is none, better than that there is none.
    """

    name: str
    arch: str
    features: frozenset[str]
    rows: tuple[KernelRow, ...]
    dialect: str
    absent: tuple[tuple[str, Reason], ...] = ()

    def __str__(self) -> str:
        return f"{self.name}:{self.arch}" if self.arch else self.name

    def rows_for(self, op: str) -> list[KernelRow]:
        return sorted((r for r in self.rows if r.op == op), key=lambda r: r.rank)

    def lacks(self, op: str) -> Reason | None:
        """Why this target has no row for ``op``, where it says so."""
        return dict(self.absent).get(op)

    def row(self, name: str) -> KernelRow:
        """The row called ``name``; raises InputError."""
        for r in self.rows:
            if r.name == name:
                return r
        raise InputError(f"target {self} has no kernel {name!r}; see 'qcompiler kernels --target {self}'")

    def choose(self, request: Request, phases: Sequence[Phase] = PHASES) -> Choice | None:
        """The first entry point (by rank) that has a serving row for every phase, or None."""
        rows = self.rows_for(request.op)
        for entry in dict.fromkeys((r.entry, r.layout) for r in rows):
            found: list[tuple[Phase, KernelRow]] = []
            for phase in phases:
                serving = [
                    r for r in rows if (r.entry, r.layout) == entry and not r.why_not(request, self.features, phase.m)
                ]
                if serving:
                    found.append((phase, serving[0]))
            if found and len(found) == len(phases):
                return Choice(tuple(found))
        return None

    def why_not(self, request: Request, phases: Sequence[Phase] = PHASES) -> list[Reason]:
        """Empty when some kernel serves ``request`` in every phase, else the reasons of the nearest row.

        Rows that take the codes at all are nearer than rows that do not, those of as many bits nearer than others; then
        the one with the fewest reasons.
        """
        if self.choose(request, phases) is not None:
            return []
        rows = self.rows_for(request.op)
        if not rows and (told := self.lacks(request.op)) is not None:
            return [told]
        if not rows:
            known = ", ".join(sorted({r.op for r in self.rows})) or "nothing"
            return [Reason("QC201", f"target {self} has no kernel for {request.op}; it has {known}", "skip the site")]
        rows = [r for r in rows if request.fn in r.fns] or rows
        own = [r for r in rows if request.scheme.dtype.name in r.codes]
        own = own or [r for r in rows if request.scheme.bits in {dtype(c).bits for c in r.codes}] or rows
        return min((self._row_reasons(r, request, phases) for r in own), key=len)

    def declined(self, request: Request, phases: Sequence[Phase] = PHASES) -> dict[str, list[Reason]]:
        """Row name -> why it declines, for every row of that op which does; of several of a name, the nearest."""
        out: dict[str, list[Reason]] = {}
        for row in self.rows_for(request.op):
            reasons = self._row_reasons(row, request, phases)
            out[row.name] = min(out.get(row.name, reasons), reasons, key=len)
        return {name: reasons for name, reasons in out.items() if reasons}

    def _row_reasons(self, row: KernelRow, request: Request, phases: Iterable[Phase]) -> list[Reason]:
        phases = list(phases)
        own = [p for p in phases if row.serves_rows(p.m)] or phases
        reasons = (reason for p in own for reason in row.why_not(request, self.features, p.m))
        return list(dict.fromkeys(reasons))
