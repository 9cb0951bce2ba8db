"""What launchers write into the environment, and which rank follows from it."""

from __future__ import annotations

import pytest

from m2mkd_ds.distributed.start.launched import derived_port, expand_counts, expand_node_list, launched_rank, place_of

SRUN = {
    "SLURM_JOB_ID": "1000003", "SLURM_STEP_ID": "2", "SLURM_JOB_NODELIST": "gpu[1-9]", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_NTASKS": "9", "SLURM_STEP_TASKS_PER_NODE": "3,2", "SLURM_TASKS_PER_NODE": "1(x9)",
    "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.99",
}  # fmt: skip
"""The last of five tasks, in a step on two of the nine nodes of a job; srun was called on a login node."""


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("login1", ["login1"]),
        ("a,b-2.cluster", ["a", "b-2.cluster"]),
        ("gpu[08-10,12],login1", ["gpu08", "gpu09", "gpu10", "gpu12", "login1"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("rack[0-1]n[01-02]", ["rack0n01", "rack0n02", "rack1n01", "rack1n02"]),
        ("n[2,1]-ib", ["n2-ib", "n1-ib"]),
    ],
)
def test_a_node_list_is_spelled_out_in_order(text: str, names: list[str]) -> None:
    assert expand_node_list(text) == names


@pytest.mark.parametrize("text", ["", "a,,b", "n[1-", "n]1[", "n[a-b]", "n[3-1]", "n[]"])
def test_a_node_list_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        expand_node_list(text)


def test_tasks_per_node_are_spelled_out() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("8") == [8]
    with pytest.raises(ValueError, match=r"cannot read '2\(3\)'"):
        expand_counts("2(3)")


def test_a_task_of_srun_knows_its_place() -> None:
    place = place_of(SRUN)
    assert place is not None
    assert (place.rank, place.size, place.local_rank, place.local_size, place.spans_hosts) == (4, 5, 1, 2, True)
    assert place.master_addr == "gpu07"  # where rank 0 is, not where srun was called
    assert place.master_port == 20000 + (7 * 1000003 + 2) % 12000 == 20000 + 7000023 % 12000 == 24023
    assert launched_rank(SRUN) == 4


def test_a_task_of_srun_takes_the_meeting_point_that_the_user_gives() -> None:
    place = place_of({**SRUN, "MASTER_ADDR": "10.1.1.7", "MASTER_PORT": "29501"})
    assert place is not None and (place.master_addr, place.master_port, place.rank) == ("10.1.1.7", 29501, 4)


def test_ports_stay_below_those_of_outgoing_connections() -> None:
    assert {derived_port(number) for number in range(12000)} == set(range(20000, 32000))


def test_a_batch_script_is_one_process_whatever_the_job_has() -> None:
    """sbatch sets SLURM_NTASKS and SLURM_PROCID for the script itself."""
    assert place_of({"SLURM_NTASKS": "9", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "3"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": ""}, "SLURM_PROCID is ''"),
        ({"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "none of SLURM_STEP_NODELIST"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3"}, r"5 tasks, but 2 nodes \(gpu07, gpu08\) with \[3\]"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3(x2)"}, r"5 tasks, but 2 nodes .* with \[3, 3\]"),
    ],
)
def test_a_task_that_was_told_half_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_of({**SRUN, **change})


def test_launchers_tell_how_many_ranks_share_a_host_or_do_not() -> None:
    rank = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
    sizes = [{"LOCAL_SIZE": "2"}, {"LOCAL_WORLD_SIZE": "4"}, {}]
    places = [place_of({**rank, **size}) for size in sizes]
    assert [place and (place.local_size, place.spans_hosts) for place in places] == [(2, True), (4, False), (None, False)]
    inner = place_of({**SRUN, **rank})  # torchrun or deepspeed inside srun: theirs is the last word
    assert inner is not None and inner.launcher == "environment"


def test_accelerate_s_single_process_of_several_is_refused() -> None:
    with pytest.raises(ValueError, match="with --multi_gpu it starts them all"):
        place_of({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    assert place_of({"ACCELERATE_MIXED_PRECISION": "no"}) is None
