"Do what `nbdev_docs` does before it starts Quarto: configuration, index of names, processed notebooks."

import sys
from pathlib import Path

from nbdev.doclinks import _build_modidx
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # settings.ini names modules in `tools`

if __name__ == "__main__":
    refresh_quarto_yml()
    _build_modidx()
    nbdev_sidebar.__wrapped__()
    proc_nbs(force=True, n_workers=0)
