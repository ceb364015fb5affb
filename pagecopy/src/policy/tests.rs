//! What the policy decides, by rounds that are made up.

use super::*;
use proptest::prelude::*;

fn sample(remaining: u64, acked: u64) -> Sample {
    Sample {
        remaining_logical_bytes: remaining,
        dirtied_pages: remaining / 4096,
        acked_logical_bytes: acked,
        acked_wire_bytes: acked / 4,
        state_time_us: 20_000,
        waited_us: 0,
    }
}

#[test]
fn predicts_logical_from_logical() {
    let mut policy = Precopy::new(Limits::default(), 1_000_000);
    // 1 GB/s of logical bytes, a quarter of that on the wire; 400 MB remain.
    assert_eq!(policy.on_sync(2_000_000, sample(500_000_000, 1_000_000_000)), Decision::NextRound);
    assert_eq!(policy.on_sync(2_500_000, sample(400_000_000, 1_500_000_000)), Decision::NextRound);
    assert_eq!(policy.expected_downtime_us(), 420_000);
    assert_eq!(policy.logical_bytes_per_s(), 1_000_000_000);
    assert_eq!(policy.wire_bytes_per_s(), 250_000_000);
    assert_eq!(policy.dirty_pages_per_s(), 2 * (400_000_000 / 4096));
    let decision = policy.on_sync(2_900_000, sample(280_000_000, 1_900_000_000));
    let reason = SwitchReason::WithinLimit;
    assert_eq!(decision, Decision::SwitchOver { predicted_downtime_us: 300_000, reason });
}

/// On a long path a little takes as long as a round trip, and no more of it takes no longer.
#[test]
fn the_path_is_not_taken_for_what_is_sent() {
    let mut policy = Precopy::new(Limits { downtime_ms: 1, ..Limits::default() }, 0);
    let sample = |waited_us, acked| Sample { waited_us, ..sample(100_000, acked) };
    policy.on_sync(1_000_000, sample(100_000, 90_000_000));
    policy.on_sync(1_101_000, sample(200_000, 90_100_000));
    policy.on_sync(1_202_000, sample(300_000, 90_200_000));
    // 200 kB in 2 ms of 202, and 20 ms for the state.
    assert_eq!(policy.expected_downtime_us(), 21_000);
    assert!(policy.logical_bytes_per_s() < 1_000_000);
}

/// What a sync would find is known before, where it takes long.
#[test]
fn a_sync_that_takes_long_is_foreseen() {
    let mut policy = Precopy::new(Limits::default(), 0);
    policy.on_sync(1_000_000, sample(500_000_000, 1_000_000_000));
    assert_eq!(policy.foresee(0), None, "after the first pass alone");
    policy.on_sync(1_500_000, sample(400_000_000, 1_500_000_000));
    assert_eq!(policy.expected_downtime_us(), 420_000);
    assert_eq!(policy.foresee(281_000_000), None);
    assert_eq!(policy.expected_downtime_us(), 420_000);
    let reason = SwitchReason::WithinLimit;
    assert_eq!(
        policy.foresee(280_000_000),
        Some(Decision::SwitchOver { predicted_downtime_us: 300_000, reason })
    );
    assert_eq!(policy.expected_downtime_us(), 300_000);
}

#[test]
fn the_first_pass_alone_does_not_decide() {
    let mut policy = Precopy::new(Limits::default(), 0);
    assert_eq!(policy.on_sync(1_000_000, sample(4096, 1 << 30)), Decision::NextRound);
    let mut policy = Precopy::new(Limits::default(), 0);
    assert!(matches!(policy.on_sync(1_000_000, sample(0, 1 << 30)), Decision::SwitchOver { .. }));
}

#[test]
fn forcing_waits_for_the_first_pass_only() {
    let mut policy = Precopy::new(Limits::default(), 0);
    policy.force_switchover();
    let decision = policy.on_sync(1_000_000, sample(1 << 40, 1 << 20));
    assert!(matches!(decision, Decision::SwitchOver { reason: SwitchReason::Forced, .. }));
}

#[test]
fn without_acknowledgements_nothing_is_predicted() {
    let mut policy = Precopy::new(Limits { downtime_ms: 1 << 40, ..Limits::default() }, 0);
    for i in 1..20 {
        assert_eq!(policy.on_sync(i * 1000, sample(4096, 0)), Decision::NextRound);
        assert_eq!(policy.expected_downtime_us(), u64::MAX);
    }
}

/// Remainders as (multiples of 1 GiB); the decisions' rounds and what they were.
fn until_end(limits: Limits, remaining: impl Fn(u64) -> u64) -> (u64, Decision) {
    let mut policy = Precopy::new(limits, 0);
    (1..10_000)
        .map(|i| (i, policy.on_sync(i * 1_000_000, sample(remaining(i) << 30, i << 30))))
        .find(|(_, decision)| *decision != Decision::NextRound)
        .expect("every migration ends")
}

#[test]
fn out_of_rounds_switches_at_a_local_minimum() {
    let limits = Limits { max_rounds: Some(10), ..Limits::default() };
    // Round 12 is the next dip.
    let (round, decision) = until_end(limits, |i| if i % 4 == 0 { 2 } else { 5 });
    assert!(matches!(decision, Decision::SwitchOver { reason: SwitchReason::OutOfRounds, .. }));
    assert_eq!(round, 12);
    // Ever growing: only the grace ends it.
    assert_eq!(until_end(limits, |i| i).0, 10 + u64::from(GRACE_ROUNDS));
}

#[test]
fn gives_up_where_told_to() {
    let limits = Limits { max_rounds: Some(10), last_resort_downtime_ms: Some(2000), ..Limits::default() };
    let (_, decision) = until_end(limits, |_| 3);
    assert!(matches!(
        decision,
        Decision::GiveUp {
            reason: GiveUpReason::DowntimeTooLong { predicted_us: 3_020_000, limit_us: 2_000_000, .. }
        }
    ));
    for on_timeout in [OnTimeout::Cancel, OnTimeout::SwitchOver, OnTimeout::Postcopy] {
        let limits = Limits { total_ms: Some(5000), on_timeout, ..Limits::default() };
        let (round, decision) = until_end(limits, |_| 3);
        assert_eq!(round, 6);
        assert!(match on_timeout {
            OnTimeout::Cancel =>
                matches!(decision, Decision::GiveUp { reason: GiveUpReason::OutOfTime { .. } }),
            OnTimeout::SwitchOver =>
                matches!(decision, Decision::SwitchOver { reason: SwitchReason::OutOfTime, .. }),
            OnTimeout::Postcopy => decision == Decision::Postcopy,
        });
    }
}

#[test]
fn limits_count_from_the_request_whatever_was_in_between() {
    let limits = Limits { max_rounds: Some(10), total_ms: Some(30_000), ..Limits::default() };
    let earlier = Earlier {
        requested_us: 1_000_000,
        rounds: 9,
        acked_logical_bytes: 1 << 40,
        acked_wire_bytes: 1 << 39,
    };
    let begin = || Precopy::new(limits, 20_000_000).after(earlier);
    assert_eq!(begin().interrupt(31_000_000, || 0), None);
    let Some(Decision::GiveUp { reason }) = begin().interrupt(31_200_000, || 0) else { panic!("time is up") };
    assert!(reason.to_string().starts_with("precopy has run for 30.2 s of the 30 s allowed"), "{reason}");
    // The tenth round is the last, and a rate is that of what came since.
    let mut policy = begin();
    let first = Sample { acked_logical_bytes: (1 << 40) + (1 << 30), ..sample(1 << 34, 0) };
    let decision = policy.on_sync(21_000_000, first);
    assert!(
        matches!(decision, Decision::SwitchOver { reason: SwitchReason::OutOfRounds, .. }),
        "{decision:?}"
    );
    assert_eq!(policy.logical_bytes_per_s(), 1 << 30);
}

#[test]
fn reasons_give_numbers_as_people_say_them() {
    let time = GiveUpReason::OutOfTime { elapsed_us: 2_512_345, limit_us: 2_500_000 };
    assert!(time.to_string().contains("for 2.5 s of the 2.5 s allowed"), "{time}");
    let downtime = GiveUpReason::DowntimeTooLong { rounds: 18, predicted_us: 3_020_001, limit_us: 2_000_000 };
    assert!(downtime.to_string().contains("for 3021 ms of the 2000 ms allowed"), "{downtime}");
}

#[test]
fn without_a_limit_a_stalled_guest_is_never_stopped() {
    let mut policy = Precopy::new(Limits::default(), 0);
    for i in 1..5000 {
        assert_eq!(policy.on_sync(i * 10_000, sample(1 << 34, i << 22)), Decision::NextRound);
    }
    assert!(policy.stalled());
}

#[test]
fn interrupts_a_round_for_what_cannot_wait() {
    let limits = Limits { total_ms: Some(5000), on_timeout: OnTimeout::SwitchOver, ..Limits::default() };
    let mut policy = Precopy::new(limits, 0);
    assert_eq!(policy.interrupt(1_000_000, || 1 << 30), None);
    policy.force_switchover();
    assert_eq!(policy.interrupt(1_000_000, || 1 << 30), None, "the first pass is completed");
    let out_of_time = policy.interrupt(5_000_001, || 1 << 30);
    assert!(matches!(out_of_time, Some(Decision::SwitchOver { reason: SwitchReason::OutOfTime, .. })));
    let mut policy = Precopy::new(Limits::default(), 0);
    policy.on_sync(1_000_000, sample(1 << 33, 1 << 30));
    policy.on_sync(2_000_000, sample(1 << 33, 2 << 30));
    assert_eq!(policy.interrupt(2_500_000, || 1 << 32), None);
    policy.force_switchover();
    let forced = policy.interrupt(2_500_000, || 1 << 32);
    let (reason, predicted_downtime_us) = (SwitchReason::Forced, 4_020_000);
    assert_eq!(forced, Some(Decision::SwitchOver { predicted_downtime_us, reason }));
    policy.start_postcopy();
    assert_eq!(policy.interrupt(2_500_000, || 1 << 32), Some(Decision::Postcopy));
}

#[test]
fn stalls_when_nothing_shrinks() {
    let mut policy = Precopy::new(Limits::default(), 0);
    for i in 1..=6 {
        assert!(!policy.stalled());
        policy.on_sync(i * 1_000_000, sample(1 << 34, i << 30));
    }
    assert!(policy.stalled());
    policy.on_sync(7_000_000, sample(1 << 33, 7 << 30));
    assert!(!policy.stalled());
}

fn any_sample() -> impl Strategy<Value = (u64, Sample)> {
    let number = || prop_oneof![any::<u64>(), 0u64..1 << 36, Just(0), Just(u64::MAX)];
    (number(), number(), number(), number(), number(), number()).prop_map(|(now, a, b, c, d, e)| {
        let sample = Sample {
            remaining_logical_bytes: a,
            dirtied_pages: b,
            acked_logical_bytes: c,
            acked_wire_bytes: d,
            state_time_us: e,
            waited_us: 0,
        };
        (now, sample)
    })
}

proptest! {
    /// Whatever comes in: no panic, and no switchover beyond the limit unless forced or out of rounds; and a longer
    /// limit never waits where a shorter one switches.
    #[test]
    fn keeps_to_the_limit(
        start: u64,
        limit in prop_oneof![any::<u64>(), 0u64..10_000],
        more: u64,
        max_rounds in prop::option::of(0u32..40),
        samples in prop::collection::vec(any_sample(), 1..60),
        force_at in prop::option::of(0usize..60),
    ) {
        let limits = Limits { downtime_ms: limit, max_rounds, ..Limits::default() };
        let mut policy = Precopy::new(limits, start);
        let wider = Limits { downtime_ms: limit.saturating_add(more), ..limits };
        let mut wide = Precopy::new(wider, start);
        for (i, (now, sample)) in samples.into_iter().enumerate() {
            if force_at == Some(i) { policy.force_switchover(); wide.force_switchover(); }
            let decision = policy.on_sync(now, sample);
            let wide_decision = wide.on_sync(now, sample);
            if let Decision::SwitchOver { predicted_downtime_us, reason } = decision {
                match reason {
                    SwitchReason::WithinLimit => {
                        prop_assert!(predicted_downtime_us <= limit.saturating_mul(1000));
                        prop_assert!(i >= 1 || sample.remaining_logical_bytes == 0);
                    }
                    SwitchReason::Forced => prop_assert!(force_at.is_some_and(|at| at <= i)),
                    SwitchReason::OutOfRounds => {
                        prop_assert!(max_rounds.is_some_and(|rounds| i + 1 >= rounds as usize));
                    }
                    SwitchReason::OutOfTime => prop_assert!(false, "there is no limit of time"),
                }
                let switches = matches!(wide_decision, Decision::SwitchOver { .. });
                prop_assert!(switches);
            }
            let _ = (policy.stalled(), policy.dirty_pages_per_s(), policy.logical_bytes_per_s());
            prop_assert_eq!(policy.rounds() as usize, i + 1);
        }
    }

    /// A guest that dirties at most half of what the link moves comes to an end within the limit.
    #[test]
    fn a_converging_guest_ends(
        bytes in 1u64 << 28..1 << 40,
        rate in 1u64 << 24..1 << 34,
        percent in 0u64..50,
    ) {
        let mut policy = Precopy::new(Limits::default(), 0);
        let (mut now, mut acked, mut remaining) = (0u64, 0, bytes);
        for round in 0..80 {
            let us = (u128::from(remaining) * 1_000_000 / u128::from(rate)) as u64 + 1000;
            now += us;
            acked += remaining;
            remaining = ((u128::from(us) * u128::from(rate * percent / 100) / 1_000_000) as u64).min(bytes);
            match policy.on_sync(now, sample(remaining, acked)) {
                Decision::NextRound => prop_assert!(round < 79, "does not end"),
                Decision::SwitchOver { reason, .. } => {
                    prop_assert_eq!(reason, SwitchReason::WithinLimit);
                    break;
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
