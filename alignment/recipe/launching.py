"""The section `launch:` of a recipe or a stage: on which processes, nodes and queue a stage runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from alignment.recipe.section import PositiveInt, Section


class Slurm(Section):
    """What `--slurm` asks the queue for; each key is the option of `sbatch` that it is named after."""

    partition: str | None = None
    account: str | None = None
    time: Annotated[str, Field(pattern=r"^(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})$")] | None = Field(
        default=None, description='limit of one job, "08:00:00" or "2-12:00:00"; at its end it saves and queues again'
    )
    gpus_per_node: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        default=None, description="0 on a partition without GPUs; without it, one for each process of a node"
    )
    nodes: PositiveInt | None = Field(default=None, description="the same as launch.nodes")
    constraint: str | None = None
    setup: str = Field(default="", description="shell lines for the start of the job: modules, a virtual environment")
    extra: list[Annotated[str, Field(pattern=r"^-[^\n]*$")]] = Field(
        default_factory=list, description="further options of sbatch, taken as they are: --exclusive, --qos=long"
    )


class Launch(Section):
    """How a stage is started. Not part of the fingerprint."""

    processes: PositiveInt = Field(default=1, description="of all nodes together")
    nodes: PositiveInt = 1
    deepspeed: str | None = Field(default=None, description="a file of ds_configs/")
    accelerate: str | None = Field(
        default=None, description="an own `accelerate` configuration, instead of processes and deepspeed"
    )
    env: dict[str, str] = Field(default_factory=dict)
    timeout: Annotated[int, Field(ge=0, strict=True)] = Field(
        default=1200, description="seconds without a step after which a run counts as hung; 0: never"
    )
    slurm: Slurm | None = Field(default=None, description="for `alignment run --slurm`")

    @property
    def machines(self) -> int:
        """On how many nodes it runs, wherever that is written."""
        return self.nodes if self.slurm is None else self.slurm.nodes or self.nodes

    @property
    def processes_per_node(self) -> int:
        """Processes of one node; with an own accelerate configuration that file decides, and this means nothing."""
        return self.processes // self.machines

    @model_validator(mode="after")
    def _one_way(self) -> Launch:
        if self.accelerate is not None and self.model_fields_set & {"deepspeed", "processes"}:
            raise ValueError("accelerate names the whole launch: give it without deepspeed and processes")
        return self
