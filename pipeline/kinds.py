"""What can be asked of a loader, by name: here so that a command line knows it without importing torch."""

from typing import Literal

LoaderKind = Literal["auto", "dali", "resident", "torch"]
ChosenLoader = Literal["dali", "resident", "torch"]
Decode = Literal["auto", "window", "whole"]
