"""What torch calls at the end of ``import torch``, in every program of the environment: only the plugin may fail.

An editable install copies this file too, so that a clone that was deleted, moved or is half edited does not take torch with it.
"""

import logging


def install_hook() -> None:
    """Register with LAVIS as soon as it is imported (lavis_mafa/plugin.py)."""
    try:
        from lavis_mafa.plugin import install_hook as install
    except (ImportError, SyntaxError, OSError) as error:
        logging.getLogger("lavis_mafa").warning(
            "lavis-mafa is installed, but cannot be imported (%s); install it again, or run `pip uninstall lavis-mafa`.", error
        )
        return
    install()
