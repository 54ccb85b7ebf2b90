"""The memory source keeps the contract."""

from modelstow.backends import Source
from modelstow.backends.conformance import SourceContract
from modelstow.backends.memory import MemorySource


class TestMemory(SourceContract):
    def folder(self) -> str:
        return "mem://host/models"

    def make(self) -> Source:
        return MemorySource({f"mem://host/models/{name}": data for name, data in self.OBJECTS.items()})
