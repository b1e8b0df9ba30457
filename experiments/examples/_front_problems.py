"""Test problems with known Pareto fronts: two of VLMOP's, ZDT, DTLZ2 and the RE suite.

Every problem is one function of a point in a box, of which gradients exist almost everywhere, and
its front: by formula, or for the RE problems from the suite's published files. RE22, RE23, RE25,
RE35 and RE36 are left out: they round some of their variables, so that gradients say nothing of
them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import jax
import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """Objectives to minimise over a box.

    Attributes:
      name: In capitals, as in the papers.
      evaluate: From a point (n,) of the box to its objectives (m,), in the problem's own units.
      low: (n,), the lowest point of the box.
      high: (n,), the highest.
      ideal: (m,), the least value of each objective on the front.
      nadir: (m,), the largest value of each objective on the front.
      front: From a number of points to the front (f, m); None if it is in a file of the RE suite.
    """

    name: str
    evaluate: Callable[[jax.Array], jax.Array]
    low: np.ndarray
    high: np.ndarray
    ideal: np.ndarray
    nadir: np.ndarray
    front: Callable[[int], np.ndarray] | None = None

    @property
    def num_tasks(self) -> int:
        """The number of objectives."""
        return len(self.ideal)

    def losses_fn(self, unit: jax.Array) -> jax.Array:
        """Returns the objectives (m,), scaled so that the front fills [0, 1], at a point (n,).

        ``unit`` is a point of the unit cube, which is stretched to the box.
        """
        low, high = jnp.asarray(self.low), jnp.asarray(self.high)
        ideal, nadir = jnp.asarray(self.ideal), jnp.asarray(self.nadir)
        return (self.evaluate(low + (high - low) * unit) - ideal) / (nadir - ideal)


def load_front(problem: Problem, data_dir: Path | None, num_points: int = 1000) -> np.ndarray:
    """Returns points of the true front (f, m), scaled as `Problem.losses_fn` scales.

    Raises:
      FileNotFoundError: The front is in a file of the RE suite, and there is none.
    """
    if problem.front is not None:
        front = problem.front(num_points)
    else:
        front = read_suite(data_dir, f"reference_points_{problem.name}.dat")
    scaled: np.ndarray = (front - problem.ideal) / (problem.nadir - problem.ideal)
    return scaled


def read_suite(data_dir: Path | None, name: str) -> np.ndarray:
    """Returns the numbers of one file of the RE suite."""
    path = None if data_dir is None else data_dir / "re_suite.zip"
    if path is None or not path.exists():
        raise FileNotFoundError(
            "expected re_suite.zip, the reference points of the RE suite, in the folder that "
            f"--data-dir names, got {data_dir}"
        )
    with ZipFile(path) as archive, archive.open(f"re/{name}") as file:
        numbers: np.ndarray = np.loadtxt(file)
    return numbers


def _evenly(curve: np.ndarray, points: int) -> np.ndarray:
    """Returns points of a curve (d, 2), drawn densely, at even distances along it."""
    steps = np.linalg.norm(np.diff(curve, axis=0), axis=1)
    steps = np.where(steps > 20 * np.median(steps), 0, steps)  # from one piece to the next
    along = np.concatenate([[0], np.cumsum(steps)])
    even: np.ndarray = curve[np.searchsorted(along, np.linspace(0, 0.999999, points) * along[-1])]
    return even


# --- problems by formula ----------------------------------------------------------------------


def _vlmop(name: str, bend: Callable[[jax.Array], jax.Array], worst: float) -> Problem:
    n = 10

    def evaluate(x: jax.Array) -> jax.Array:
        ends = jnp.array([[1.0], [-1.0]]) / np.sqrt(n)
        return bend(jnp.sum((x[None, :] - ends) ** 2, axis=1))

    def front(points: int) -> np.ndarray:
        along = np.linspace(-1, 1, 50 * points)
        squares = np.stack([(along - 1) ** 2, (along + 1) ** 2], axis=1)
        return _evenly(np.asarray(bend(jnp.asarray(squares))), points)

    corner = np.array([worst, worst])
    return Problem(name, evaluate, -np.ones(n), np.ones(n), np.zeros(2), corner, front)


def vlmop1() -> Problem:
    """Two paraboloids: a convex front (as in LibMOON, of 10 variables)."""
    return _vlmop("VLMOP1", lambda squares: squares / 4, 1.0)


def vlmop2() -> Problem:
    """Two bells, ``1 - exp(-|x - c|^2)``: a concave front (Fonseca and Fleming 1995)."""
    return _vlmop("VLMOP2", lambda squares: 1 - jnp.exp(-squares), 1 - np.exp(-4.0))


def _zdt(name: str, shape: Callable[[jax.Array, jax.Array], jax.Array], nadir: float) -> Problem:
    n = 30

    def evaluate(x: jax.Array) -> jax.Array:
        first, g = x[0], 1 + 9 * jnp.mean(x[1:])
        return jnp.stack([first, g * shape(first, g)])

    def front(points: int) -> np.ndarray:
        first = np.linspace(0, 1, 50 * points)
        heights = np.asarray(shape(jnp.asarray(first), jnp.ones(len(first))))
        lower = np.minimum.accumulate(heights)
        kept = (heights <= lower) & (np.diff(lower, prepend=np.inf) < 0)  # not dominated
        return _evenly(np.stack([first, heights], axis=1)[kept], points)

    ideal = np.array([0.0, 0.0 if name != "ZDT3" else -0.7733690])
    high = np.array([1.0 if name != "ZDT3" else 0.8518328, nadir])
    # The root of the first variable has no gradient at 0.
    low = np.where(np.arange(n) == 0, 1e-9, 0.0)
    return Problem(name, evaluate, low, np.ones(n), ideal, high, front)


def zdt1() -> Problem:
    """A convex front, ``1 - sqrt(f)`` (Zitzler, Deb and Thiele 2000)."""
    return _zdt("ZDT1", lambda f, g: 1 - jnp.sqrt(f / g), 1.0)


def zdt2() -> Problem:
    """A concave front, ``1 - f^2``."""
    return _zdt("ZDT2", lambda f, g: 1 - (f / g) ** 2, 1.0)


def zdt3() -> Problem:
    """A front of five pieces."""

    def shape(f: jax.Array, g: jax.Array) -> jax.Array:
        return 1 - jnp.sqrt(f / g) - f / g * jnp.sin(10 * jnp.pi * f)

    return _zdt("ZDT3", shape, 1.0)


def dtlz2() -> Problem:
    """An eighth of a sphere, 3 objectives of 12 variables (Deb et al. 2002)."""

    def evaluate(x: jax.Array) -> jax.Array:
        radius = 1 + jnp.sum((x[2:] - 0.5) ** 2)
        cosines, sines = jnp.cos(x[:2] * jnp.pi / 2), jnp.sin(x[:2] * jnp.pi / 2)
        return radius * jnp.stack([cosines[0] * cosines[1], cosines[0] * sines[1], sines[0]])

    def front(points: int) -> np.ndarray:
        # Even on the sphere: the polar cosine and the azimuth are even.
        side = int(np.sqrt(points))
        height, turn = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, np.pi / 2, side))
        around = np.sqrt(1 - height**2)
        sphere = np.stack([around * np.cos(turn), around * np.sin(turn), height], axis=-1)
        return sphere.reshape(-1, 3)

    return Problem("DTLZ2", evaluate, np.zeros(12), np.ones(12), np.zeros(3), np.ones(3), front)


# --- the RE suite: Tanabe and Ishibuchi 2020 --------------------------------------------------


def _violation(constraints: list[jax.Array]) -> jax.Array:
    """Returns the sum by which constraints ``g >= 0`` are violated: an objective of its own."""
    return jnp.sum(jnp.maximum(-jnp.stack(constraints), 0))


def re21() -> Problem:
    """Four-bar truss: volume and displacement."""
    force, modulus, length, stress = 10.0, 2e5, 200.0, 10.0
    unit, root = force / stress, np.sqrt(2.0)

    def evaluate(x: jax.Array) -> jax.Array:
        volume = length * (2 * x[0] + root * x[1] + jnp.sqrt(x[2]) + x[3])
        bars = 2 / x[0] + 2 * root / x[1] - 2 * root / x[2] + 2 / x[3]
        return jnp.stack([volume, force * length / modulus * bars])

    return Problem(
        "RE21",
        evaluate,
        unit * np.array([1, root, root, 1]),
        np.full(4, 3 * unit),
        np.array([1237.8414230005742, 0.002761423749158419]),
        np.array([2886.3695604236013, 0.04]),
    )


def re24() -> Problem:
    """Hatch cover: weight and violated constraints."""

    def evaluate(x: jax.Array) -> jax.Array:
        flange, beam = x
        modulus = 700000.0
        buckling = modulus * flange**2 / 100
        bending = 4500 / (flange * beam)
        shear = 1800 / beam
        deflection = 56.2 * 10000 / (modulus * flange * beam**2)
        limits = [
            1 - bending / 700,
            1 - shear / 450,
            1 - deflection / 1.5,
            1 - bending / buckling,
        ]
        return jnp.stack([flange + 120 * beam, _violation(limits)])

    return Problem(
        "RE24",
        evaluate,
        np.array([0.5, 0.5]),
        np.array([4.0, 50.0]),
        np.array([60.5, 0.0]),
        np.array([481.608088535, 44.2819047619]),
    )


def re31() -> Problem:
    """Two-bar truss: volume, stress and violated constraints."""

    def evaluate(x: jax.Array) -> jax.Array:
        left, right = jnp.sqrt(16 + x[2] ** 2), jnp.sqrt(1 + x[2] ** 2)
        volume = x[0] * left + x[1] * right
        stress = 20 * left / (x[0] * x[2])
        other = 80 * right / (x[2] * x[1])
        return jnp.stack([volume, stress, _violation([0.1 - volume, 1e5 - stress, 1e5 - other])])

    return Problem(
        "RE31",
        evaluate,
        np.array([1e-5, 1e-5, 1.0]),
        np.array([100.0, 100.0, 3.0]),
        np.array([5.53731918799e-05, 0.333333333333, 0.0]),
        np.array([500.002668442, 8246211.25124, 19359919.7502]),
    )


def re32() -> Problem:
    """Welded beam: cost, deflection and violated constraints."""

    def evaluate(x: jax.Array) -> jax.Array:
        load, length, young, shear = 6000.0, 14.0, 30e6, 12e6
        weld, weld_length, height, width = x
        cost = 1.10471 * weld**2 * weld_length + 0.04811 * height * width * (14 + weld_length)
        deflection = 4 * load * length**3 / (young * width * height**3)
        arm = ((weld + height) / 2) ** 2
        moment = load * (length + weld_length / 2)
        radius = jnp.sqrt(weld_length**2 / 4 + arm)
        polar = 2 * np.sqrt(2) * weld * weld_length * (weld_length**2 / 12 + arm)
        primary, secondary = load / (np.sqrt(2) * weld * weld_length), moment * radius / polar
        mixed = primary * secondary * weld_length / radius
        stress = jnp.sqrt(primary**2 + mixed + secondary**2)
        bending = 6 * load * length / (width * height**2)
        slenderness = 1 - height / (2 * length) * np.sqrt(young / (4 * shear))
        critical = 4.013 * young * height * width**3 / 6 / length**2 * slenderness
        limits = [13600 - stress, 30000 - bending, width - weld, critical - load]
        return jnp.stack([cost, deflection, _violation(limits)])

    return Problem(
        "RE32",
        evaluate,
        np.array([0.125, 0.1, 0.1, 0.125]),
        np.array([5.0, 10.0, 10.0, 5.0]),
        np.array([0.010205496875, 0.00043904, 0.0]),
        np.array([35.3096156, 17561.6, 425062976.628]),
    )


def re33() -> Problem:
    """Disc brake: mass, stopping time and violated constraints."""

    def evaluate(x: jax.Array) -> jax.Array:
        inner, outer, force, discs = x
        squares, cubes = outer**2 - inner**2, outer**3 - inner**3
        mass = 4.9e-5 * squares * (discs - 1)
        time = 9.82e6 * squares / (force * discs * cubes)
        limits = [
            outer - inner - 20,
            0.4 - force / (3.14 * squares),
            1 - 2.22e-3 * force * cubes / squares**2,
            2.66e-2 * force * discs * cubes / squares - 900,
        ]
        return jnp.stack([mass, time, _violation(limits)])

    return Problem(
        "RE33",
        evaluate,
        np.array([55.0, 75.0, 1000.0, 11.0]),
        np.array([80.0, 110.0, 3000.0, 20.0]),
        np.array([-0.721525, 1.13907203907, 0.0]),
        np.array([5.3067, 9.06681054, 4323470580.0]),
    )


def re34() -> Problem:
    """Vehicle crash: mass, acceleration and intrusion, quadratic fits of five thicknesses."""

    def evaluate(x: jax.Array) -> jax.Array:
        a, b, c, d, e = x
        mass = 1640.2823 + jnp.vdot(
            jnp.array([2.3573285, 2.3220035, 4.5688768, 7.7213633, 4.4559504]), x
        )
        acceleration = 6.5856 + 1.15 * a - 1.0427 * b + 0.9738 * c + 0.8364 * d
        acceleration += -0.3695 * a * d + 0.0861 * a * e + 0.3628 * b * d
        acceleration += -0.1106 * a**2 - 0.3437 * c**2 + 0.1764 * d**2
        intrusion = -0.0551 + 0.0181 * a + 0.1024 * b + 0.0421 * c - 0.0073 * a * b
        intrusion += 0.024 * b * c - 0.0118 * b * d - 0.0204 * c * d - 0.008 * c * e
        intrusion += -0.0241 * b**2 + 0.0109 * d**2
        return jnp.stack([mass, acceleration, intrusion])

    return Problem(
        "RE34",
        evaluate,
        np.ones(5),
        np.full(5, 3.0),
        np.array([1661.7078225, 6.14280000608, 0.0394]),
        np.array([1695.2002035, 10.7454, 0.26399999965]),
    )


# Monomials of RE37 in (alpha, HA, OA, OPTT): exponents, and a coefficient for each objective.
_INJECTOR = (
    ((0, 0, 0, 0), (0.692, 0.153, 0.370)),
    ((1, 0, 0, 0), (0.477, -0.322, -0.205)),
    ((0, 1, 0, 0), (-0.687, 0.396, 0.0307)),
    ((0, 0, 1, 0), (-0.080, 0.424, 0.108)),
    ((0, 0, 0, 1), (-0.0650, 0.0226, 1.019)),
    ((2, 0, 0, 0), (-0.167, 0.175, -0.135)),
    ((1, 1, 0, 0), (-0.0129, 0.0185, 0.0141)),
    ((0, 2, 0, 0), (0.0796, -0.0701, 0.0998)),
    ((1, 0, 1, 0), (-0.0634, -0.251, 0.208)),
    ((0, 1, 1, 0), (-0.0257, 0.179, -0.0301)),
    ((0, 0, 2, 0), (0.0877, 0.0150, -0.226)),
    ((1, 0, 0, 1), (-0.0521, 0.0134, 0.353)),
    ((0, 1, 0, 1), (0.00156, 0.0296, 0.0)),
    ((0, 0, 1, 1), (0.00198, 0.0752, -0.0497)),
    ((0, 0, 0, 2), (0.0184, 0.0192, -0.423)),
    ((2, 1, 0, 0), (0.0, 0.0, 0.202)),
    ((2, 0, 1, 0), (0.0, 0.0, -0.281)),
    ((1, 2, 0, 0), (0.0, 0.0, -0.342)),
    ((0, 2, 1, 0), (0.0, 0.0, -0.245)),
    ((0, 1, 2, 0), (0.0, 0.0, 0.281)),
    ((1, 0, 0, 2), (0.0, 0.0, -0.184)),
    ((1, 1, 1, 0), (0.0, 0.0, -0.281)),
)


def re37() -> Problem:
    """Rocket injector: two temperatures and a distance, cubic fits of four variables."""
    exponents = np.array([powers for powers, _ in _INJECTOR])
    coefficients = np.array([values for _, values in _INJECTOR])

    def evaluate(x: jax.Array) -> jax.Array:
        # Chosen among 1, x, x^2: a power of a variable that is zero has no gradient.
        powers = jnp.stack([jnp.ones_like(x), x, x * x])
        monomials = jnp.prod(powers[exponents, np.arange(4)], axis=1)
        return monomials @ jnp.asarray(coefficients)

    return Problem(
        "RE37",
        evaluate,
        np.zeros(4),
        np.ones(4),
        np.array([0.00889341391106, 0.00488, -0.431499999825]),
        np.array([1.002, 1.09751726, 1.09380596]),
    )


def re41() -> Problem:
    """Car side impact: weight, pubic force, velocity and violated constraints."""

    def evaluate(x: jax.Array) -> jax.Array:
        a, b, c, d, e, f, g = x
        weight = 1.98 + jnp.vdot(jnp.array([4.9, 6.67, 6.98, 4.01, 1.78, 1e-5, 2.73]), x)
        force = 4.72 - 0.5 * d - 0.19 * b * c
        pillar = 10.58 - 0.674 * a * b - 0.67275 * b
        door = 16.45 - 0.489 * c * g - 0.843 * e * f
        abdomen = 1.16 - 0.3717 * b * d - 0.0092928 * c
        upper = 0.261 - 0.0159 * a * b - 0.06486 * a - 0.019 * b * g + 0.0144 * c * e
        middle = 0.214 + 0.00817 * e - 0.0587118 * a + 0.03099 * b * f - 0.018 * b * g
        lower = 0.74 - 0.61 * b - 0.031296 * c - 0.031872 * g + 0.227 * b**2
        limits = [
            1 - abdomen,
            0.32 - (upper + 0.0154464 * f),
            0.32 - (middle + 0.030408 * c - 0.00364 * e * f - 0.018 * b**2),
            0.32 - lower,
            32 - (28.98 + 3.818 * c - 4.2 * a * b + 1.27296 * f - 2.68065 * g),
            32 - (35.31728 + 2.95 * c - 5.057 * a * b - 3.795 * b - 3.4431 * g),
            32 - (46.36 - 9.9 * b - 4.4505 * a),
            4 - force,
            9.9 - pillar,
            15.7 - door,
        ]
        return jnp.stack([weight, force, (pillar + door) / 2, _violation(limits)])

    return Problem(
        "RE41",
        evaluate,
        np.array([0.5, 0.45, 0.5, 0.5, 0.875, 0.4, 0.4]),
        np.array([1.5, 1.35, 1.5, 1.5, 2.625, 1.2, 1.2]),
        np.array([15.576004, 3.58525, 10.61064375, 0.0]),
        np.array([42.7680062, 4.42724878, 13.0913557, 9.44926882]),
    )


def re61() -> Problem:
    """Urban drainage: five costs and violated constraints of three sizes."""

    def evaluate(x: jax.Array) -> jax.Array:
        storage, treatment, overflow = x
        area = 2289.0
        inverse = 1 / (storage * treatment)
        limits = [
            1 - (0.00139 * inverse + 4.94 * overflow - 0.08),
            1 - (0.000306 * inverse + 1.082 * overflow - 0.0986),
            50000 - (12.307 * inverse + 49408.24 * overflow + 4051.02),
            16000 - (2.098 * inverse + 8046.33 * overflow - 696.71),
            10000 - (2.138 * inverse + 7883.39 * overflow - 705.04),
            2000 - (0.417 * storage * treatment + 1721.26 * overflow - 136.54),
            550 - (0.164 * inverse + 631.13 * overflow - 54.48),
        ]
        objectives = [
            106780.37 * (treatment + overflow) + 61704.67,
            3000 * storage,
            305700 * area * treatment / (0.06 * area) ** 0.65,
            250 * area * jnp.exp(-39.75 * treatment + 9.9 * overflow + 2.74),
            25 * (1.39 * inverse + 4940 * overflow - 80),
            _violation(limits),
        ]
        return jnp.stack(objectives)

    return Problem(
        "RE61",
        evaluate,
        np.full(3, 0.01),
        np.array([0.45, 0.10, 0.10]),
        np.array([63840.2774, 30.0, 285346.896494, 183749.967061, 7.22222222222, 0.0]),
        np.array([76347.3928, 1350.0, 2853468.96, 15725809.9, 346735.0, 93789.3225]),
    )


FORMULAS = (vlmop1, vlmop2, zdt1, zdt2, zdt3, dtlz2)
SUITE = (re21, re24, re31, re32, re33, re34, re37, re41, re61)
PROBLEMS = {make().name: make for make in (*FORMULAS, *SUITE)}
