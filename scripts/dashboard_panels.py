"""The dashboard's panels, row by row: what `make_dashboard.py` writes as Grafana's JSON."""

from collections.abc import Sequence
from dataclasses import dataclass

from pear_ray.telemetry.gauges import RUN_STATES, STAGE_STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A panel.

    Attributes:
        text: What it says and what is wrong when it looks wrong, in a sentence or two.
        queries: PromQL by legend; `@` stands for the chosen runs, and `{{tag}}` for a tag's value.
        unit: Grafana's name of it.
        kind: `timeseries`, `stat` or `state-timeline`.
        width: In columns.
        bound: Where a line is drawn, and beyond which it is red; `is_minimum` says on which side.
        states: The words of a state's numbers.
    """

    title: str
    text: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    bound: float | None = None
    is_minimum: bool = False
    states: Sequence[str] = ()
    is_stacked: bool = False


def of_run(metric: str, *, by: str = "run", only: str = "") -> str:
    """The query of one of our gauges: a series per value of the tags `by`, of the chosen runs."""
    return f'max by ({by}) (ray_pear_ray_{metric}{{run=~"$run"{only}}})'


RUNS = (
    Panel(
        title="Run",
        text="What the run is doing, in the word of `pear status`. Silent: no news for five "
        "minutes. Dead: its driver is gone without a word.",
        queries={"{{run}}": of_run("run_state")},
        kind="stat",
        states=RUN_STATES,
    ),
    Panel(
        title="Stages done",
        text="Share of the run's stages that are done, the running one by its steps. Stages "
        "differ in length: time is in the next panel.",
        queries={"{{run}}": of_run("run_done_fraction")},
        unit="percentunit",
        kind="stat",
    ),
    Panel(
        title="Left of the running stage",
        text="The ETA of `pear status`: the steps left at the median pace of the last ones.",
        queries={"{{run}} {{stage}}": of_run("stage_eta_s", by="run, stage")},
        unit="s",
        kind="stat",
    ),
    Panel(
        title="Stages",
        text="When each stage ran and how it ended.",
        queries={"{{run}} {{stage}}": of_run("stage_state", by="run, stage")},
        kind="state-timeline",
        width=16,
        states=STAGE_STATES,
    ),
    Panel(
        title="Warnings",
        text="Warnings since the driver started, and metrics of the last step that are no finite"
        " numbers. `pear status` has the sentences.",
        queries={
            "{{run}}": of_run("run_warnings"),
            "{{run}} {{stage}} not finite": of_run("stage_not_finite", by="run, stage"),
        },
        kind="stat",
    ),
    Panel(
        title="Step",
        text="Share of the stage's steps that is done. A stage that was resumed begins at its "
        "last checkpoint.",
        queries={
            "{{run}} {{stage}}": f"{of_run('stage_step', by='run, stage')} / "
            f"({of_run('stage_steps', by='run, stage')} > 0)"
        },
        unit="percentunit",
    ),
    Panel(
        title="Silence and unsaved work",
        text="Seconds since the run's last news, seconds of work that a lost node would cost, and "
        "seconds that a stage has waited for devices. The first should stay near the time of a "
        "step, the second below that of checkpoint_every steps.",
        queries={
            "{{run}} silent": of_run("run_silent_s"),
            "{{run}} {{stage}} unsaved": of_run("stage_unsaved_s", by="run, stage"),
            "{{run}} {{stage}} waits": of_run("stage_waiting_s", by="run, stage"),
        },
        unit="s",
    ),
    Panel(
        title="Tokens per second",
        text="As each stage counts them: collected, scored, trained or sampled tokens.",
        queries={"{{run}} {{stage}}": of_run("stage_tokens_per_s", by="run, stage")},
    ),
)
SFT = (
    Panel(
        title="SFT loss",
        text="The weighted loss that is trained, and the plain one beside it, nats per token. A "
        "plain one that rises while the weighted one falls is the weights' choice, not a "
        "fault.",
        queries={
            "{{run}} weighted": of_run("sft_weighted_loss"),
            "{{run}} plain": of_run("sft_nll"),
        },
    ),
    Panel(
        title="SFT effective sample size",
        text="Of PEAR's weights, over the step's tokens and within sequences. Below 0.2 few "
        "tokens decide the gradient.",
        queries={
            "{{run}} tokens": of_run("sft_ess_fraction"),
            "{{run}} within sequences": of_run("sft_sequence_ess_fraction"),
        },
        unit="percentunit",
        bound=0.2,
        is_minimum=True,
    ),
    Panel(
        title="SFT clip fractions",
        text="Tokens whose log-ratio is beyond its clip, and whose summed log-weight is at its "
        "floor (they do not train) or ceiling.",
        queries={
            "{{run}} ratio low": of_run("sft_log_ratio_clip_low_fraction"),
            "{{run}} ratio high": of_run("sft_log_ratio_clip_high_fraction"),
            "{{run}} weight floor": of_run("sft_log_weight_floor_fraction"),
            "{{run}} weight ceiling": of_run("sft_log_weight_ceiling_fraction"),
        },
        unit="percentunit",
    ),
)
RL = (
    Panel(
        title="Reward",
        text="Mean reward of the step's rollouts, and the share that is correct.",
        queries={
            "{{run}} reward": of_run("rl_reward_mean"),
            "{{run}} correct": of_run("rl_correct_fraction"),
        },
    ),
    Panel(
        title="pass@k",
        text="On the evaluation's problems, while SFT and RL train (`pass_at_k.every`) and of "
        "each checkpoint that `evaluate` has done. Reward that rises without it is another "
        "problem's.",
        queries={
            "{{run}} sft pass@{{k}}": of_run("sft_eval_pass_at_k", by="run, k"),
            "{{run}} rl pass@{{k}}": of_run("rl_eval_pass_at_k", by="run, k"),
            "{{run}} {{suite}} pass@{{k}}": of_run("eval_pass_at_k", by="run, suite, k"),
        },
        unit="percentunit",
    ),
    Panel(
        title="Rollouts that teach nothing",
        text="Groups whose outcomes all agree, completions that were cut off, rewards that could"
        " not be computed.",
        queries={
            "{{run}} degenerate": of_run("rl_degenerate_group_fraction"),
            "{{run}} truncated": of_run("rl_truncated_fraction"),
            "{{run}} errored": of_run("rl_errored_fraction"),
        },
        unit="percentunit",
    ),
    Panel(
        title="RL clip fractions",
        text="Tokens that train whose ratio is clipped below and above. With one update per "
        "batch they are near 0; a rise says that the policy moves faster than its rollouts.",
        queries={
            "{{run}} low": of_run("rl_clip_fraction_low"),
            "{{run}} high": of_run("rl_clip_fraction_high"),
        },
        unit="percentunit",
    ),
    Panel(
        title="Sampler and trainer",
        text="Mean difference of their log-probs of the same tokens, and the gap right after the"
        " last weight sync, nats per token. Above 0.01 the numerics are wrong, not the "
        "learning.",
        queries={
            "{{run}} mean gap": of_run("rl_mismatch_mean_gap"),
            "{{run}} sync gap": of_run("rl_sync_gap"),
        },
        bound=0.01,
    ),
    Panel(
        title="Worth of the rollouts",
        text="Effective sample size of the trainer's probabilities over the sampler's, and of "
        "the correction's weights. 1 where both agree.",
        queries={
            "{{run}} rollouts": of_run("rl_mismatch_ess_fraction"),
            "{{run}} correction": of_run("rl_correction_ess_fraction"),
        },
        unit="percentunit",
        bound=0.8,
        is_minimum=True,
    ),
    Panel(
        title="Completion length and entropy",
        text="Tokens per completion, and the policy's entropy in nats per token. An entropy that"
        " falls to nothing has stopped exploring.",
        queries={
            "{{run}} length": of_run("rl_completion_length_mean"),
            "{{run}} entropy": of_run("rl_entropy"),
        },
    ),
    Panel(
        title="Gradient norm",
        text="Before clipping. A jump comes before a loss that goes astray.",
        queries={
            "{{run}} sft": of_run("sft_grad_norm"),
            "{{run}} rl": of_run("rl_grad_norm"),
        },
    ),
    Panel(
        title="Seconds of an RL step",
        text="By phase, of the slowest rank. What grows is what to look at: sample with the "
        "length of completions, reward with the verifier.",
        queries={
            "{{run}} {{phase}}": of_run(
                "time_s",
                by="run, phase",
                only=',phase=~"sample|reward|wake_trainer|train|sync|save"',
            )
        },
        unit="s",
        is_stacked=True,
    ),
)
MACHINES = (
    Panel(
        title="Memory ledger",
        text="Held at the end of each phase of an RL step by the fullest rank: of a GPU all that"
        " is taken, on a CPU the worker's resident memory. `pear plan` says what each phase"
        " should take.",
        queries={"{{run}} {{phase}}": of_run("memory_gib", by="run, phase")},
        unit="gbytes",
    ),
    Panel(
        title="GPU use",
        text="Of every GPU of the cluster. Low while sampling: too few sequences at once. Low "
        "while training: microbatches too small.",
        queries={"{{instance}} {{GpuIndex}}": "ray_node_gpus_utilization"},
        unit="percent",
    ),
    Panel(
        title="GPU memory",
        text="Share that is taken, by whomever. Near 1 it runs out at the next longer row.",
        queries={
            "{{instance}} {{GpuIndex}}": "ray_node_gram_used / "
            "(ray_node_gram_used + ray_node_gram_available)"
        },
        unit="percentunit",
        bound=0.98,
    ),
    Panel(
        title="CPU use",
        text="Of every node. At 100 % while GPUs wait, the verifiers or the tokenizer are too few.",
        queries={"{{instance}}": "ray_node_cpu_utilization"},
        unit="percent",
    ),
    Panel(
        title="Node memory",
        text="Share that is in use. From 0.95 on Ray ends workers.",
        queries={"{{instance}}": "ray_node_mem_used / ray_node_mem_total"},
        unit="percentunit",
        bound=0.93,
    ),
    Panel(
        title="Object store and disk",
        text="Bytes in Ray's object store, and the share of the disk that is used. From 95 % on "
        "Ray spills no more.",
        queries={
            "{{instance}} object store": "ray_object_store_used_memory",
            "{{instance}} disk free": "ray_node_disk_free",
        },
        unit="bytes",
    ),
)
ROWS = {"Runs": RUNS, "SFT": SFT, "RL": RL, "Memory and machines": MACHINES}
