"""Everything `torch.compile(backend="ditopt", options={...})` accepts, each option declared once.

An option that is handy while debugging also names a `DITOPT_*` environment variable. An explicit
option wins over its variable. `python -m ditopt.config > docs/env_vars.md` writes the table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ditopt.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from ditopt.plan import Plan


def _option(default: Any, meaning: str, env: str | None = None) -> Any:
    """A field with its meaning and, where it has one, its environment variable."""
    return Field(default, description=meaning, json_schema_extra={"env": env} if env else None)


class Options(BaseModel):
    """How one `torch.compile` call is to be optimized."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: Any = _option(None, "A `ditopt.Plan` or a plan file's path. None: lossless work only.")
    strict: bool = _option(False, "Turn every fallback and doubt into an error.", "DITOPT_STRICT")
    inductor: dict[str, Any] = _option({}, "Options handed to Inductor as they are.")
    fuse_projections: bool = _option(True, "Merge projections that read one tensor (q, k, v).")
    hoist: bool = _option(True, "Keep what depends on the prompt or timestep only between calls.")
    rounding_kernel: bool | None = _option(
        None, "Round activations by a kernel of ditopt's own. None: on GPUs."
    )
    cuda_graphs: bool = _option(False, "Launch each step as one CUDA graph.", "DITOPT_CUDA_GRAPHS")
    gate_group: str | None = _option(None, "Process group whose ranks share a plan's gate.")
    release_weights: bool = _option(False, "Free the originals of weights that were fused.")
    disable: tuple[str, ...] = _option((), "Passes to leave out (a comma list).", "DITOPT_DISABLE")
    stop_after: str | None = _option(None, "Name of the last pass to run.", "DITOPT_STOP_AFTER")
    fuel: int | None = _option(None, "Rewrites to apply, then none: for bisecting.", "DITOPT_FUEL")
    dump: Path | None = _option(None, "Folder for each pass's graphs and decisions.", "DITOPT_DUMP")

    @field_validator("plan")
    @classmethod
    def _plan_or_path(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str | os.PathLike):
            return Path(value)
        from ditopt.plan import Plan  # only who passes a Plan pays for the import

        if not isinstance(value, Plan):
            raise ValueError("expected a ditopt.Plan or a path")
        return value

    @field_validator("disable", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("fuel")
    @classmethod
    def _not_negative(cls, value: int | None) -> int | None:
        if value is not None and value < 0:
            raise ValueError("expected a number of rewrites, 0 or more")
        return value

    @classmethod
    def parse(
        cls, options: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
    ) -> Options:
        """Options from the mapping a user passed; the environment fills what it leaves out.

        Args:
            options: what stood in `torch.compile(options=...)`.
            environ: variables to read; the process environment by default.

        Raises:
            ConfigError: an unknown name (with the closest known ones) or a bad value.
        """
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError(
                f"options must map names to values, got {type(options).__name__}",
                remedy='Write options={"plan": "plan.yaml"}.',
            )
        given = dict(options or {})
        for name in given:
            if name not in cls.model_fields:
                remedy = did_you_mean(str(name), cls.model_fields)
                raise ConfigError(f"unknown ditopt option {name!r}", remedy=remedy)
        from_env = _read_environment(os.environ if environ is None else environ)
        try:
            return cls(**{**from_env, **given})
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0])
            source = f"option {field!r}" if field in given else env_variables()[field]
            message = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{source}: {message}, got {first['input']!r}") from error

    def load_plan(self) -> Plan | None:
        """The plan, read from its file where a path was given."""
        if isinstance(self.plan, Path):
            from ditopt.plan import Plan

            return Plan.load(self.plan)
        plan: Plan | None = self.plan
        return plan


def env_variables() -> dict[str, str]:
    """Each option that has an environment variable, with the variable's name."""
    return {
        name: str(field.json_schema_extra["env"])
        for name, field in Options.model_fields.items()
        if isinstance(field.json_schema_extra, dict)
    }


def _read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    variables = env_variables()
    known = set(variables.values())
    for name in environ:
        if name.startswith("DITOPT_") and name not in known:
            remedy = did_you_mean(name, known)
            raise ConfigError(f"unknown environment variable {name}", remedy=remedy)
    return {option: environ[env] for option, env in variables.items() if environ.get(env)}


def env_table() -> str:
    """The text of docs/env_vars.md: one table of options and their environment variables."""
    variables = env_variables()
    lines = [
        "# Options and environment variables",
        "",
        "Generated by `python -m ditopt.config > docs/env_vars.md`; do not edit. Options go to",
        '`torch.compile(model, backend="ditopt", options={...})` and win over the environment.',
        "",
        "| option | variable | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in Options.model_fields.items():
        variable = f"`{variables[name]}`" if name in variables else ""
        lines.append(f"| `{name}` | {variable} | `{field.default!r}` | {field.description} |")
    lines += [
        "",
        "Logging is Python's own: `TORCH_LOGS=\"+ditopt\"` shows ditopt's debug messages,",
        '`TORCH_LOGS="+ditopt.passes"` those of the passes.',
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(env_table(), end="")
