"""What the hardware spends its time in: each with one signature, a plain form to test against, and a choice by platform."""

from typing import Literal

AttentionKernel = Literal["auto", "plain", "blocked", "chunked", "splash"]
