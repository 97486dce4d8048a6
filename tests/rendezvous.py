"""A meeting place for ranks that a test starts as processes of their own."""

from __future__ import annotations

from torch.distributed import TCPStore


def host_store() -> tuple[TCPStore, dict[str, str]]:
    """A store in this process, and the environment that leads ranks to it, as torchrun does.

    The operating system chooses the port while the store takes it, so nobody else can take it in
    between. The store ends with its last reference: keep it until the ranks have ended.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return store, address | agent
