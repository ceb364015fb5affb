//! Limits of a live migration, on the command line and in requests to a `vm`.

use clap::Args;
use pageferry::pagecopy::throttle::PERCENT_MAX;
use pageferry::{OnTimeout, Tuning};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rate;

/// What may be set for a migration, and again while it runs; what is left out stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Args, Serialize, Deserialize, JsonSchema)]
pub(super) struct TuningArgs {
    /// Longest downtime to aim for, in milliseconds [default: 300]
    #[arg(long = "downtime-limit", value_name = "MS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_limit_ms: Option<u64>,
    /// Send at most so much a second over all streams together, until the guest is paused: 1Gbit, 100MB/s, or bytes; 0: no limit
    #[arg(long, value_name = "RATE", value_parser = rate::parse)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// Switch over at the next good moment after so many rounds, whatever the downtime; 0: no limit
    #[arg(long, value_name = "N")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rounds: Option<u32>,
    /// Do as --on-timeout says when the guest was not handed over after so many seconds; 0: no limit
    #[arg(long, value_name = "S")]
    #[serde(default, rename = "timeout_s", skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// What to do after --timeout: cancel, switchover whatever the downtime, or postcopy [default: cancel]
    #[arg(long, value_name = "WHAT", value_parser = on_timeout)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<OnTimeoutArg>,
    /// Take time from the vCPUs of a guest that writes faster than it is copied
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_converge: Option<bool>,
    /// With --auto-converge: take at most so many percent [default: 99]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=99))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle_max: Option<u8>,
    /// Pause the guest and wait for `ctl ... continue` before its state is moved
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_before_switchover: Option<bool>,
}

/// [`OnTimeout`] by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum OnTimeoutArg {
    Cancel,
    Switchover,
    Postcopy,
}

fn on_timeout(text: &str) -> Result<OnTimeoutArg, String> {
    match text {
        "cancel" => Ok(OnTimeoutArg::Cancel),
        "switchover" => Ok(OnTimeoutArg::Switchover),
        "postcopy" => Ok(OnTimeoutArg::Postcopy),
        _ => Err("use cancel, switchover or postcopy".into()),
    }
}

impl TuningArgs {
    /// Takes over what is set.
    pub(super) fn apply(&self, tuning: &mut Tuning) {
        let limits = &mut tuning.limits;
        if let Some(ms) = self.downtime_limit_ms {
            limits.downtime_ms = ms;
        }
        if let Some(rate) = self.bandwidth {
            tuning.bandwidth = Some(rate).filter(|&rate| rate != 0);
        }
        if let Some(rounds) = self.max_rounds {
            limits.max_rounds = Some(rounds).filter(|&rounds| rounds != 0);
        }
        if let Some(seconds) = self.timeout {
            limits.total_ms = Some(seconds.saturating_mul(1000)).filter(|&ms| ms != 0);
        }
        match self.on_timeout {
            Some(OnTimeoutArg::Cancel) => limits.on_timeout = OnTimeout::Cancel,
            Some(OnTimeoutArg::Switchover) => limits.on_timeout = OnTimeout::SwitchOver,
            Some(OnTimeoutArg::Postcopy) => limits.on_timeout = OnTimeout::Postcopy,
            None => {}
        }
        if let Some(auto) = self.auto_converge {
            tuning.auto_converge = auto;
        }
        if let Some(percent) = self.throttle_max {
            tuning.throttle_max = percent.min(PERCENT_MAX);
        }
        if let Some(pause) = self.pause_before_switchover {
            tuning.pause_before_switchover = pause;
        }
    }

    /// With everything set.
    pub(super) fn full() -> Self {
        Self {
            downtime_limit_ms: Some(0),
            bandwidth: Some(0),
            max_rounds: Some(0),
            timeout: Some(0),
            on_timeout: Some(OnTimeoutArg::Cancel),
            auto_converge: Some(true),
            throttle_max: Some(1),
            pause_before_switchover: Some(true),
        }
    }

    /// Whether more is set than the bandwidth.
    pub(super) fn has_more_than_bandwidth(&self) -> bool {
        Self { bandwidth: None, ..self.clone() } != Self::default()
    }

    /// The limits of a new migration.
    pub(super) fn tuning(&self) -> Tuning {
        let mut tuning = Tuning::default();
        self.apply(&mut tuning);
        tuning
    }
}
