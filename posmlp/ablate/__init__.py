"""The paper's ablations at any scale: tables of `rows`, the `runs` behind them, what they gave (`report`)."""
