from trsp_core.errors import TrspError
def require_memory(n, what): pass
