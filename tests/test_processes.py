"""Messages between ranks outside collectives: a stop reaches all ranks, and old messages are deleted."""

import multiprocessing
import os
import socket

import pytest
import torch.distributed as dist
from communicators import together

from launcher import processes
from launcher.processes import Ranks, Stopped, connect, print_error


def test_a_stop_of_one_rank_stops_all_ranks():
    def work(comm):
        def do():
            if comm.ranks.rank == 1:
                raise Stopped("SIGUSR2")

        comm.together("loading", do)

    results = together(3, work)

    assert [type(result) for result in results] == [Stopped] * 3
    assert str(results[1]) == "SIGUSR2"


@pytest.mark.parametrize(("kind", "heard"), [(ValueError, ValueError), (OSError, ValueError), (KeyError, RuntimeError)])
def test_an_error_of_one_rank_is_raised_on_all_ranks_and_names_it(kind, heard):
    def work(comm):
        def do():
            if comm.ranks.rank == 1:
                raise kind("no such file")

        comm.together("data", do)

    results = together(2, work)

    assert isinstance(results[1], kind)
    assert isinstance(results[0], heard)
    assert "rank 1: " in str(results[0])


def test_messages_of_earlier_rounds_are_deleted():
    """Otherwise a run that saves at every step would fill the memory of the process that keeps the store."""

    store = dist.HashStore()

    def work(comm):
        return [comm.gather("rows", [comm.ranks.rank, number]) for number in range(20)]

    results = together(2, work, store=store)

    assert results[0] == results[1] == [[[0, number], [1, number]] for number in range(20)]
    assert store.num_keys() == 2  # each rank's last message


@pytest.mark.parametrize(("rank", "shared", "printed"), [(0, True, 1), (0, False, 1), (1, True, 0), (1, False, 1)])
def test_an_error_is_printed_once_unless_a_rank_may_be_the_only_one_with_it(rank, shared, printed, monkeypatch, capsys):
    monkeypatch.setattr(processes, "PATIENCE_S", 0.01)

    print_error(ValueError("no such file"), rank == 0, shared=shared)

    assert capsys.readouterr().err == "error: no such file\n" * printed


def test_a_rank_that_its_launcher_ends_meanwhile_prints_nothing(capsys):
    """torchrun ends the others as soon as rank 0 has printed the error and exited."""
    print_error(ValueError("no such file"), False, shared=False, ended=lambda: True)

    assert capsys.readouterr().err == ""


def test_an_accelerate_launch_that_started_fewer_processes_than_asked_is_refused():
    """The environment of `accelerate launch --cpu --num_processes 2`: one process and no error."""
    environ = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}

    with pytest.raises(ValueError, match="asked for several processes but started one"):
        Ranks.from_environment(environ)

    assert Ranks.from_environment({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "here"}) == Ranks()


def _connect(port, answers):
    numbers = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(numbers | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"})
    try:
        connect(Ranks(0, 2, 0, 2))
    except Exception as error:
        answers.send((type(error).__name__, str(error)))
    os._exit(0)


def test_a_port_that_another_program_uses_is_named_with_the_options_that_choose_another():
    reading, writing = multiprocessing.Pipe(duplex=False)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        child = multiprocessing.get_context("spawn").Process(target=_connect, args=(port, writing))
        child.start()
        kind, said = reading.recv()
        child.join()

    assert kind == "ValueError"
    assert f"rank 0 cannot listen on port {port}: another job or program uses it" in said
    assert "--port of loldu launch" in said
