"Read the description of the package from settings.ini and pass it to setuptools."

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LICENSES = {"apache2": "Apache-2.0"}  # The names of settings.ini and of SPDX
STATUSES = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}

config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def readme() -> str:
    "README.md with absolute addresses: the package index has no files beside it."
    text = (HERE / "README.md").read_text(encoding="utf-8")
    raw = settings["git_url"].replace("github.com", "raw.githubusercontent.com")
    text = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|[#/])", rf"\g<1>{raw}/{settings['branch']}/", text)
    return re.sub(r"(\]\()(?![a-z]+:|[#/])", rf"\g<1>{settings['git_url']}/blob/{settings['branch']}/", text)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=settings["author"],
    url=settings["git_url"],
    license=LICENSES[settings["license"]],
    keywords=settings["keywords"].split(),
    classifiers=[
        f"Development Status :: {STATUSES[settings['status']]}",
        f"Intended Audience :: {settings['audience']}",
        "Intended Audience :: Science/Research",
        f"Natural Language :: {settings['language']}",
        "Operating System :: POSIX",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
    packages=find_packages(include=[settings["lib_name"], f"{settings['lib_name']}.*"]),
    package_data={settings["lib_name"]: ["py.typed"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={name: settings[f"{name}_requirements"].split() for name in ("evaluate", "near_duplicates", "dev")},
    entry_points={
        "console_scripts": settings.get("console_scripts", "").split(),
        "nbdev": [f"{settings['lib_name']} = {settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
