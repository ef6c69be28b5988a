from ..core.machine import free_memory as free_memory
