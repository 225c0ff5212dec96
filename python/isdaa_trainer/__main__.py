"""`python -m isdaa_trainer`, the same as `isdaa-train`."""

from isdaa_trainer.train import main

raise SystemExit(main())
