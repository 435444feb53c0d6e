"""Several processes that train one adapter: who they are, how they meet, and how one is missed.

They hold the same base, adapter and optimizer, compute different micro-batches of a step, and make
the same update from the same sum. Process 0 alone reads settings, writes the run directory and
speaks to the user; what it knows it tells the others.

They are torch.distributed's, started by torchrun or by `start_others`. Small things go through its
key-value store, where whoever waits also sees who is gone; tensors through its process group: gloo,
and NCCL between CUDA devices.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from phitune.errors import LostProcessError, SettingsError
from phitune.model.device import torch_device
from phitune.plan.machine import check_processes
from phitune.training.state import TrainingState
from phitune.training.sums import Span

# Seconds. A process says so often that it is there; one that did not for longer is lost. Who waits
# for a piece of a tensor waits as long, and a store that cannot be reached is given up after that.
_PULSE, _LOST = 2.0, 25.0
# One that was never heard of may still be loading torch, or waiting for its machine.
_COMING = 600.0
# Process 0 waits so long at its end for those who may still ask it why.
_LEAVING = 3.0
# Who waits looks as often, at first and later.
_LOOKS = (0.0005, 0.02)
# Bytes of a tensor that are sent at once, so that slow networks send some piece in time.
_PIECE = 2**26
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Member:
    """What torchrun says of this process in its environment."""

    rank: int
    size: int
    local_rank: int  # on its machine
    local_size: int
    address: str  # of the store
    port: int

    @classmethod
    def from_environment(cls) -> "Member | None":
        """None where this process is alone.

        Raises:
            SettingsError: a variable is missing, or is no number.
        """
        if int(os.environ.get("WORLD_SIZE", "1") or 1) == 1:
            return None
        try:
            size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
            return cls(
                rank,
                size,
                int(os.environ.get("LOCAL_RANK", rank)),
                int(os.environ.get("LOCAL_WORLD_SIZE", size)),
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
            )
        except (KeyError, ValueError) as error:
            raise SettingsError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, so this is one of several processes,"
                f" but of its environment this cannot be used: {error}; start them with torchrun"
            ) from None

    def environment(self) -> dict[str, str]:
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


class Processes:
    """This process alone: there is nobody to meet."""

    rank, size, local_rank, local_size = 0, 1, 0, 1
    device = torch.device("cpu")

    @property
    def on_this_device(self) -> int:
        """How many of them share the memory of this one's device."""
        return self.local_size if self.device.type == "cpu" else 1

    @property
    def stopping(self) -> str | None:
        """The signal by which any of them was asked to stop."""
        return None

    def start_others(self) -> None:
        """Starts the processes 1, 2, ... of this machine, where torchrun does not."""

    def ask_to_stop(self, by: str) -> None:
        """Has all of them stop after their micro-batch.

        Args:
            by: the signal's name.
        """

    def share(self, numbers: Sequence[int]) -> Sequence[int]:
        """This process's of the spans of a step: neighbours, about as many as others have."""
        first, last = (-(-len(numbers) * each // self.size) for each in (self.rank, self.rank + 1))
        return numbers[first:last]

    def meet(self, said: Any) -> list[Any]:
        """Waits for all others. Returns: what each of them said, by rank, in JSON's types.

        Raises:
            LostProcessError: one of them is gone.
        """
        return [said]

    def tell(self, name: str, said: Any) -> None:
        """Leaves something for the others."""

    def collect(self, state: TrainingState) -> None:
        """Brings all sums of the current step to process 0."""

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Makes tensors of any shape what they are in process 0."""

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """While this process trains; the others are told how it ends."""
        yield


class Group(Processes):
    """One of several processes.

    Args:
        listening: where this process holds the store.
        device: of the tensors that are sent; may be set later, before the first of them.
        starts_others: this process does, torchrun does not.
    """

    def __init__(
        self,
        member: Member,
        device: torch.device | None = None,
        listening: socket.socket | None = None,
        *,
        starts_others: bool = False,
    ) -> None:
        self.rank, self.size = member.rank, member.size
        self.local_rank, self.local_size = member.local_rank, member.local_size
        self.device = device or torch.device("cpu")
        self._member, self._starts_others = member, starts_others
        self._others: list[subprocess.Popen[bytes]] = []
        self._holds_store = listening is not None
        self._meetings = 0
        self._group: Any = None
        self._store = self._open_store(listening)
        self._pulse = Pulse(self._open_store(), self.rank, self.size)

    def _open_store(self, listening: socket.socket | None = None) -> Store:
        """A connection to the store, of which each thread needs one of its own.

        Raises:
            LostProcessError: nothing answers there.
        """
        member = self._member
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                member.address,
                member.port,
                is_master=listening is not None,
                timeout=timedelta(seconds=_LOST),
                wait_for_workers=False,
                master_listen_fd=listening.detach() if listening else None,
            )
        except RuntimeError as error:
            raise LostProcessError(
                f"process {self.rank}: nothing answers at {member.address}:{member.port}, where"
                f" process 0 or torchrun should be: {str(error).splitlines()[0]}"
            ) from None
        # What a run before a restart left there is not of this one.
        return PrefixStore(f"phitune/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    # ---------------------------------------------------------------------------------------------
    # Small things, through the store.

    @property
    def stopping(self) -> str | None:
        try:
            return self._store.get("stop").decode() if self._store.check(["stop"]) else None
        except RuntimeError as error:
            raise self._gone(error) from None

    def ask_to_stop(self, by: str) -> None:
        with suppress(RuntimeError):  # Whoever is gone is missed at the next meeting.
            self._store.set("stop", by)

    def tell(self, name: str, said: Any) -> None:
        self._store.set(name, json.dumps(said))

    def hear(self, name: str) -> Any:
        """Waits for what another process tells under a name.

        Raises:
            LostProcessError: one of them is gone.
        """
        (said,) = self._wait_for([name])
        return said

    def meet(self, said: Any) -> list[Any]:
        self._meetings += 1
        self.tell(f"meeting/{self._meetings}/{self.rank}", said)
        heard = self._wait_for([f"meeting/{self._meetings}/{rank}" for rank in range(self.size)])
        # All were at the meeting before this one, so nobody asks for what was said there any more.
        self._store.delete_key(f"meeting/{self._meetings - 1}/{self.rank}")
        return heard

    def _wait_for(self, names: list[str]) -> list[Any]:
        pause, longest = _LOOKS
        try:
            while not self._store.check(names):
                self._check_others()
                time.sleep(pause)
                pause = min(2 * pause, longest)
            return [json.loads(self._store.get(name)) for name in names]
        except RuntimeError as error:
            raise self._gone(error) from None

    def _check_others(self) -> None:
        """
        Raises:
            LostProcessError: one of them ended, or does not answer.
        """
        if self._store.check(["ended"]):
            ended = json.loads(self._store.get("ended"))
            if ended["rank"] != self.rank:
                raise EndedError(ended["rank"], ended["exit_code"], ended["message"])
        for other in self._others:
            if (code := other.poll()) is not None:
                raise LostProcessError(_lost(self._others.index(other) + 1, code))
        if (rank := self._pulse.lost) is not None:
            raise LostProcessError(_lost(rank))

    def _gone(self, error: Exception) -> LostProcessError:
        """Why the store, or a transfer, failed: within a while it is known who is gone."""
        until = time.monotonic() + _LOST + 2 * _PULSE
        try:
            while time.monotonic() < until:
                self._check_others()
                time.sleep(_LOOKS[1])
        except LostProcessError as found:
            return found
        except RuntimeError:
            pass
        holder = "torchrun's agent" if _torchrun_has_the_store() else "process 0"
        return LostProcessError(
            f"{holder} is gone, says process {self.rank}: {self._member.address}:"
            f"{self._member.port}: {str(error).splitlines()[0]}"
        )

    # ---------------------------------------------------------------------------------------------
    # Tensors, through the process group.

    def collect(self, state: TrainingState) -> None:
        """Brings all sums of the current step to process 0, in the order of the processes."""
        sums = state.sums
        heard = self.meet([[span, of_it.done] for span, of_it in sums.spans.items()])
        if self.rank:
            for of_it in sums.spans.values():
                self._send(of_it.found)
            sums.spans.clear()
            return
        for rank in range(1, self.size):
            for span, done in heard[rank]:
                found = state.room_for_a_sum()
                self._receive(found, rank)
                sums.put(span, Span(done, found))

    def spread(self, tensors: Sequence[Tensor]) -> None:
        content = _as_bytes(tensors)
        with self._transfer():
            for piece in content.split(_PIECE):
                dist.broadcast(piece, 0)
        if self.rank:
            _from_bytes(content, tensors)

    def _send(self, tensors: Sequence[Tensor]) -> None:
        with self._transfer():
            for piece in _as_bytes(tensors).split(_PIECE):
                dist.send(piece, 0)

    def _receive(self, tensors: Sequence[Tensor], rank: int) -> None:
        content = torch.empty_like(_as_bytes(tensors))
        with self._transfer():
            for piece in content.split(_PIECE):
                dist.recv(piece, rank)
        _from_bytes(content, tensors)

    @contextmanager
    def _transfer(self) -> Iterator[None]:
        try:
            if self._group is None:
                self._group = self._open_group()
            yield
        except RuntimeError as error:
            raise self._gone(error) from None

    def _open_group(self) -> Any:
        if self._member.address == _LOOPBACK:  # Else gloo listens where the host's name points.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=_LOST),
        )
        return dist.group.WORLD

    # ---------------------------------------------------------------------------------------------

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        ended = {"rank": self.rank, "exit_code": 0, "message": "it is done"}
        try:
            yield
        except BaseException as error:  # Whatever ends this one, the others are told.
            ended |= {"exit_code": getattr(error, "exit_code", 1), "message": str(error)}
            raise
        finally:
            with suppress(RuntimeError):
                self._store.compare_set("ended", "", json.dumps(ended))
                self._leave()
            self._pulse.stop()
            for other in self._others:  # They have nothing to write.
                other.kill()
                other.wait()
            if self._group is not None:
                with suppress(RuntimeError):
                    dist.destroy_process_group()

    def _leave(self) -> None:
        """Whoever holds the store waits a little for those who may still read in it."""
        self.tell(f"left/{self.rank}", True)
        until = time.monotonic() + _LEAVING
        names = [f"left/{rank}" for rank in range(self.size)]
        while self._holds_store and time.monotonic() < until and not self._store.check(names):
            if any(other.poll() is not None for other in self._others):
                return
            time.sleep(_LOOKS[1])

    def start_others(self) -> None:
        for rank in range(1, self.size if self._starts_others else 1):
            member = Member(rank, self.size, rank, self.size, _LOOPBACK, self._member.port)
            self._others.append(
                subprocess.Popen(
                    [sys.executable, "-m", "phitune", "train"],
                    env={**os.environ, **member.environment()},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is process 0's, which tells the others.
                )
            )


class EndedError(LostProcessError):
    """Another process ended, and said how."""

    def __init__(self, rank: int, exit_code: int, message: str) -> None:
        super().__init__(rank, exit_code, message)
        self.rank, self.exit_code = rank, exit_code

    def __str__(self) -> str:
        return f"process {self.rank} ended: {self.args[2]}"


class Pulse:
    """Says again and again that this process is there, and looks whether the others are."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank = store, rank
        until = time.monotonic() + _COMING
        self._lost_at = {other: until for other in range(size) if other != rank}
        self._heard = dict.fromkeys(self._lost_at, b"")
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    @property
    def lost(self) -> int | None:
        """The rank of a process whose pulse stands still."""
        now = time.monotonic()
        return next((rank for rank, at in self._lost_at.items() if now > at), None)

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        for count in itertools.count():
            # Without the store nobody is heard, and all are lost in a while.
            with suppress(RuntimeError):
                self._store.set(f"pulse/{self._rank}", str(count))
                for rank in self._lost_at:
                    name = f"pulse/{rank}"
                    if (
                        self._store.check([name])
                        and (now := self._store.get(name)) != self._heard[rank]
                    ):
                        self._heard[rank] = now
                        self._lost_at[rank] = time.monotonic() + _LOST
            if self._stopped.wait(_PULSE):
                return


def _lost(rank: int, exit_code: int | None = None) -> str:
    if exit_code is None:
        how = f"was not heard of for {_LOST:.0f} s"
    elif exit_code < 0:
        how = f"was killed by {signal.Signals(-exit_code).name}"
    else:
        how = f"ended with exit code {exit_code}"
    return f"process {rank} {how}"


def _torchrun_has_the_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Returns: all of them, end to end [bytes]."""
    return torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors])


def _from_bytes(content: Tensor, tensors: Sequence[Tensor]) -> None:
    """Fills tensors of any shape with `content` [bytes]."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    with torch.no_grad():
        for tensor, part in zip(tensors, content.split(sizes), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))


ALONE = Processes()


def first_process(size: int, device_name: str) -> Processes:
    """Process 0 of so many, or of as many as torchrun has started.

    Raises:
        SettingsError: torchrun has started another number, or the device is one for all.
    """
    device = torch_device(device_name)
    member = Member.from_environment()
    if member is None and size == 1:
        return ALONE
    check_processes(member.size if member else size, device_name.partition(":")[0])
    if member is None:
        listening = socket.create_server((_LOOPBACK, 0))
        member = Member(0, size, 0, size, _LOOPBACK, listening.getsockname()[1])
        return Group(member, device, listening, starts_others=True)
    if size not in (1, member.size):
        raise SettingsError(f"processes {size}: torchrun has started {member.size}; leave it out")
    if _torchrun_has_the_store():
        return Group(member, device)
    return Group(member, device, socket.create_server((member.address, member.port)))
