import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class build_with_hook(build_py):
    """Puts the .pth file at the root of the wheel, i.e. into site-packages, where Python runs it at start."""

    def run(self):
        super().run()
        pathlib.Path(self.build_lib).mkdir(parents=True, exist_ok=True)
        shutil.copy("torchvision_cpu_compat.pth", self.build_lib)


setup(cmdclass={"build_py": build_with_hook})
