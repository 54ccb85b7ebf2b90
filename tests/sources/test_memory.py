"""The memory source keeps the contract."""

from backends import Source
from backends.conformance import SourceContract
from backends.memory import MemorySource


class TestMemory(SourceContract):
    def folder(self) -> str:
        return "mem://host/models"

    def make(self) -> Source:
        return MemorySource({f"mem://host/models/{name}": data for name, data in self.OBJECTS.items()})
