"""The picture of a plan: growth over context, capacity, and the roofline with its steps."""

from pathlib import Path
from typing import Literal

from quire.analysis.paint import require_drawable, write_picture
from quire.analysis.plan import Plan
from quire.analysis.plan_figures import Case, Limit, growth_over_context, request_capacity
from quire.analysis.plan_scene import plan_picture
from quire.analysis.roofline import StepTime
from quire.analysis.roofline_scene import Roof, Roofline, RooflinePoint

__all__ = ["draw_plan", "require_drawable"]


def draw_plan(plan: Plan, path: Path) -> None:
    """Write the picture to a ``.png`` or ``.html`` file.

    Growth is of one request and of as many as were asked for. Raises QuireError for another
    suffix, without matplotlib, and if the file cannot be written.
    """
    asked = plan.asked
    case = Case(
        asked.shape,
        tuple(row.kv_format for row in plan.rows),
        asked.load,
        Limit(asked.hardware.name, asked.budget),
        weights=asked.weights,
        page_size=asked.page_size,
    )
    growth = growth_over_context(case, sorted({1, asked.load.sequences}))
    write_picture(plan_picture(growth, request_capacity(case), roofline_of(plan)), path)


def roofline_of(plan: Plan) -> Roofline:
    """The hardware's roof for the model's dtype, and the plan's steps below it."""
    hardware, dtype = plan.asked.hardware, plan.deployment.compute
    roof = Roof(f"{hardware.name}, {dtype}", hardware.rate(dtype), hardware.bandwidth)
    steps = [(_decode_name(n), step) for n, step in plan.speed.decode.items()]
    steps.append((f"prefill of {plan.asked.load.context:,}", plan.speed.prefill))
    return Roofline((roof,), tuple(_point(name, step) for name, step in steps))


def _decode_name(requests: int) -> str:
    return "decode" if requests == 1 else f"decode of {requests}"


def _point(name: str, step: StepTime) -> RooflinePoint:
    bound: Literal["memory", "compute"] = "compute" if step.limit == "compute" else "memory"
    return RooflinePoint(name, step.intensity, step.flops / step.seconds, bound)
