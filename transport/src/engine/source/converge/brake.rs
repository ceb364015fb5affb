//! What slows a guest down that writes faster than its pages are sent.

use std::sync::Arc;

use pagecopy::backend::{DirtyLog, Guest};
use pagecopy::layout::PAGE_SIZE;
use pagecopy::policy::Precopy;
use pagecopy::throttle::{Round, Throttle};

use super::Cause;

/// What slows a guest down. Dropped, it lets go.
pub(super) struct Brake<'a> {
    pub(super) guest: &'a Arc<dyn Guest>,
    log: &'a Arc<dyn DirtyLog>,
    pub(super) throttle: Throttle,
    /// What each vCPU had written before the last round, where that is known.
    written: Option<Vec<u64>>,
}

impl<'a> Brake<'a> {
    /// One that is not put on.
    pub(super) fn new(guest: &'a Arc<dyn Guest>, log: &'a Arc<dyn DirtyLog>) -> Self {
        Self { guest, log, throttle: Throttle::default(), written: None }
    }

    /// Whether there is a brake at all.
    pub(super) fn works(&self) -> bool {
        self.guest.throttle().is_some()
    }

    /// The most that may be taken, where anything may and can.
    pub(super) fn allowed(&self, percent_max: Option<u8>) -> Option<u8> {
        percent_max.filter(|_| self.works())
    }

    /// Takes in a round; puts the brake on further where that is allowed and needed.
    pub(super) fn on_round(
        &mut self,
        policy: &Precopy,
        remaining: u64,
        percent_max: Option<u8>,
    ) -> Result<(), Cause> {
        let written = self.log.written_by_vcpu();
        let before = std::mem::replace(&mut self.written, written);
        let by_vcpu: Option<Vec<u64>> = self.written.as_ref().map(|now| {
            let before = before.into_iter().flatten().chain(std::iter::repeat(0));
            now.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect()
        });
        let Some(percent_max) = self.allowed(percent_max) else {
            return self.release();
        };
        let (dirtied_pages, us) = policy.last_round();
        let round = Round {
            remaining,
            dirtied: dirtied_pages.saturating_mul(PAGE_SIZE as u64),
            us,
            delivered_per_s: policy.logical_bytes_per_s(),
            by_vcpu: by_vcpu.as_deref(),
        };
        let changed = self.throttle.on_round(round, percent_max);
        self.set(changed.as_deref())
    }

    /// Takes no more than that from now on, or nothing.
    pub(super) fn limit(&mut self, percent_max: Option<u8>) -> Result<(), Cause> {
        let Some(percent_max) = self.allowed(percent_max) else {
            return self.release();
        };
        let changed = self.throttle.limit(percent_max);
        self.set(changed.as_deref())
    }

    fn set(&self, percents: Option<&[u8]>) -> Result<(), Cause> {
        match (percents, self.guest.throttle()) {
            (None, _) | (_, None) => {}
            (Some([percent]), Some(throttle)) => throttle.set(*percent)?,
            (Some(percents), Some(throttle)) => throttle.set_each(percents)?,
        }
        Ok(())
    }

    fn release(&mut self) -> Result<(), Cause> {
        if !self.throttle.percents().is_empty() {
            self.throttle.release();
            self.set(Some(&[0]))?;
        }
        Ok(())
    }
}

impl Drop for Brake<'_> {
    fn drop(&mut self) {
        // A guest that cannot be let go is about to be stopped, or the migration has failed for a better reason.
        let _ = self.release();
    }
}
