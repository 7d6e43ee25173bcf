"""Who calls, what that one may see and do, and how much of it: pure accounting, and the keys behind it. No HTTP."""
