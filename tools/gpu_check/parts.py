"""The parts of the check, in the order in which they run."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """A module with ``run(settings, findings)``.

    Attributes:
        seconds: time limit. benchmark: measures without judging, and is left out of a quick check.
        module: by default that of this package with the part's name.
    """

    name: str
    about: str
    seconds: float
    benchmark: bool = False
    module: str = field(default="")

    def __post_init__(self):
        object.__setattr__(self, "module", self.module or f"{__package__}.{self.name}")


PARTS = (
    Part("environment", "card, driver, versions, number formats", 90),
    Part("kernel_build", "compile the CUDA kernel with this machine's nvcc", 150),
    Part("tests", "the tests that need a GPU", 90),
    Part("parity", "a training step and inference give the same on CPU and GPU", 90),
    Part("resume", "a run that is killed continues where its checkpoint was", 60),
    Part("ddp", "DistributedDataParallel on one process changes nothing", 40),
    Part("precision", "20 iterations in float32, bfloat16 and float16", 60),
    Part("synchronizations", "how often, and where, a training step waits for the GPU", 30),
    Part("kernel_speed", "the kernel against grid_sample and against the L2 cache", 50, benchmark=True),
    Part("step_speed", "training steps of four backbones: images per second, memory, shares", 110, benchmark=True),
    Part("inference_speed", "inference of four backbones: images per second, memory", 60, benchmark=True),
    Part("evaluation_speed", "counting of predictions on the GPU: images per second", 30, benchmark=True),
)
