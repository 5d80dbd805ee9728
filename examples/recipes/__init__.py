"""Recipes: the loss inside other people's training loops, each a file that runs as it stands."""


def missing(error: ModuleNotFoundError, how: str) -> ModuleNotFoundError:
    """The error in one line that says what to install."""
    return ModuleNotFoundError(f"this recipe needs {error.name}: {how}", name=error.name)


EXTRA = "pip install '.[recipes]' in a checkout of maskd_triton"
