"""The 84 faults and bad inputs the daemon is held to, and the test that holds each.

A place is `file::function`, or a program of `make check`. Many rows have more tests than the one that is named.
"""

# One row per fault reads best as a table.
# ruff: noqa: E501
from __future__ import annotations

# Every process is paused, as by a machine that sleeps. The hour is that of `make soak`.
SLEEP = "tests/crash/test_signals.py::test_a_pause_costs_time_and_nothing_else"
STALL = "tests/watch/test_stall.py::test_a_stalled_reader_costs_nobody_anything"

WIRE = "tests/bad_inputs/test_wire.py::test_fault_is_named_and_the_daemon_serves_on"
ARGUMENTS = "tests/bad_inputs/test_arguments.py::test_fault_is_named_and_the_daemon_serves_on"
CONFIG = "tests/bad_inputs/test_config.py::test_fault_is_named_and_the_daemon_serves_on"
DATA = "tests/bad_inputs/test_data.py::test_fault_is_named_and_the_daemon_serves_on"
PLUGIN = "tests/bad_inputs/test_plugins.py::test_a_broken_plugin_is_named_with_its_fault"

# number: (what is done to the daemon, what must come of it, the test that holds it)
CHECKLIST: dict[int, tuple[str, str, str]] = {
    1: ("garbage bytes as a message", "INVALID_ARGUMENT, the field", WIRE),
    2: ("invalid UTF-8", "INVALID_ARGUMENT, the field", WIRE),
    3: ("empty request", "the missing fields", "tests/bad_inputs/test_arguments.py::test_an_empty_request_is_told_what_it_lacks"),
    4: ("unknown fields", "served", "tests/bad_inputs/test_wire.py::test_fields_of_a_newer_version_are_no_fault"),
    5: ("request beyond the limit", "RESOURCE_EXHAUSTED", "tests/bad_inputs/test_wire.py::test_a_request_of_5_mb_is_judged_and_one_of_65_mb_is_not_taken"),
    6: ("200 KB of metadata", "RESOURCE_EXHAUSTED", "tests/bad_inputs/test_wire.py::test_metadata_of_200_kb_is_not_taken"),
    7: ("unknown method", "UNIMPLEMENTED", "tests/bad_inputs/test_wire.py::test_an_unknown_method_is_unimplemented"),
    8: ("HTTP/1.1, TLS, noise on the port", "serving", "tests/bad_inputs/test_wire.py::test_whatever_is_said_to_the_port_the_daemon_serves_on"),
    9: ("800 idle connections", "serving", "tests/bad_inputs/test_wire.py::test_idle_connections_cost_nobody_anything"),
    10: ("half-open client", "gone within keepalive", "tests/bad_inputs/test_wire.py::test_a_half_open_client_is_gone_within_keepalive"),
    11: ("reset in mid-stream", "the handler's finally ran", "tests/rpc/test_interceptor.py::test_a_caller_that_goes_away_closes_the_handler_at_once"),
    12: ("client stops reading", "memory flat", "tests/teacher/test_stalled.py::test_a_reader_who_stops_has_a_fixed_share_of_memory"),
    13: ("deadline past", "nothing computed", "tests/bad_inputs/test_teacher.py::test_a_deadline_that_is_past_computes_nothing"),
    14: ("cancel while queued or computing", "slot freed", "tests/teacher/test_service.py::test_a_pass_whose_caller_left_is_given_up_between_two_pieces"),
    15: ("slowloris on HTTP", "serving", "tests/web/test_endurance.py::test_a_client_is_left_that"),
    16: ("gzip bomb", "within the limit", "tests/bad_inputs/test_wire.py::test_a_gzip_bomb_is_not_unpacked_beyond_the_limit"),
    17: ("0 tokens, 1, the context, one more", "INVALID_ARGUMENT, the field", ARGUMENTS),
    18: ("token id -1, the vocabulary's size, 2^31-1", "INVALID_ARGUMENT, the field", ARGUMENTS),
    19: ("top_k 0, 1, the vocabulary, one more", "INVALID_ARGUMENT, the field", ARGUMENTS),
    20: ("NaN, infinity, 1e308 in a configuration", "INVALID_ARGUMENT, the field", CONFIG),
    21: ("deep or huge Struct", "INVALID_ARGUMENT, the field", CONFIG),
    22: ("bytes that don't fit the shape", "INVALID_ARGUMENT, the field", ARGUMENTS),
    23: ("names with .., /, NUL, 10 KB, emoji; case alone differs", "INVALID_ARGUMENT, the field", "tests/bad_inputs/test_config.py::test_a_name_that_is_no_name_is_refused"),
    24: ("paths to nothing, a device, a FIFO, a folder", "INVALID_ARGUMENT, the field", DATA),
    25: ("rows empty, broken, with BOM, endless", "INVALID_ARGUMENT, the line", DATA),
    26: ("request_id again", "same run, or ALREADY_EXISTS", "tests/bad_inputs/test_runs.py::test_stop_twice_and_resume_or_delete_while_running_are_conflicts"),
    27: ("forged page_token", "INVALID_ARGUMENT, the field", ARGUMENTS),
    28: ("after_revision -1, now+1, 2^63-1", "INVALID_ARGUMENT or OUT_OF_RANGE", ARGUMENTS),
    29: ("unknown enum value", "INVALID_ARGUMENT, the field", ARGUMENTS),
    30: ("clock jumps back an hour", "serving, in order", "tests/test_retention.py::test_a_clock_that_jumped_back_hides_no_young_event"),
    31: ("model files missing, cut, lying", "FAILED_PRECONDITION, the reason", "tests/security/test_model_files.py::test_the_daemon_refuses_it_with_the_reason_and_stays_up"),
    32: ("tokenizer digest mismatch", "FAILED_PRECONDITION", ARGUMENTS),
    33: ("out of memory in a load or call", "RESOURCE_EXHAUSTED, next call works", "tests/teacher/test_service.py::test_one_failing_sequence_fails_alone"),
    34: ("NaN logits", "DATA_LOSS, never sent", "tests/teacher/test_scoring.py::test_weights_that_are_no_numbers_are_an_error_not_a_result"),
    35: ("the compute thread dies", "exit 70, to be started again", "tests/teacher/test_service.py::test_a_daemon_whose_teacher_thread_dies_leaves_to_be_started_again"),
    36: ("10 x overload", "QUEUE_FULL with a retry hint", "tests/bad_inputs/test_teacher.py::test_a_full_queue_refuses_with_a_time"),
    37: ("same request twice, batched or alone", "same within tolerance", "tests/bad_inputs/test_teacher.py::test_the_same_request_gets_the_same_answer_alone_and_beside_others"),
    38: ("plugin: import error", "named, others in use", PLUGIN),
    39: ("plugin: syntax error", "named, others in use", PLUGIN),
    40: ("plugin: slow import", "told, in use", "tests/bad_inputs/test_plugins.py::test_a_slow_import_is_told"),
    41: ("plugin: sys.exit in import", "named, others in use", PLUGIN),
    42: ("plugin: wrong hook", "named, others in use", PLUGIN),
    43: ("plugin: wrong argument", "named, others in use", PLUGIN),
    44: ("plugins: one trainer's name twice", "second refused", PLUGIN),
    45: ("plugin writes to stdout", "in use, stdout clean", PLUGIN),
    46: ("hook raises, hangs, leaves", "nobody held up", "tests/bad_inputs/test_plugins.py::test_hooks_that_raise_leave_or_hang_hold_nobody_up"),
    47: ("worker segfault", "run told, teacher warm", "tests/crash/test_workers.py::test_a_worker_that_dies_leaves_a_run_that_says_so_and_resumes"),
    48: ("worker killed", "run told, resumable", "tests/crash/test_workers.py::test_a_worker_that_dies_leaves_a_run_that_says_so_and_resumes"),
    49: ("worker ignores SIGTERM", "killed after its grace", "tests/runs/test_manager.py::test_a_worker_that_ignores_the_stop_is_ended_and_the_run_can_be_resumed"),
    50: ("worker floods a million events", "bounded", "tests/crash/test_workers.py::test_a_flood_of_events_is_stored_whole_and_costs_the_daemon_no_memory"),
    51: ("worker prints 1 GB", "bounded", "tests/crash/test_workers.py::test_a_worker_that_prints_without_end_fills_no_disk"),
    52: ("worker without progress", "stall event", "tests/crash/test_workers.py::test_a_worker_that_hangs_is_told_of_and_ended_when_its_time_is_over"),
    53: ("worker outlives the daemon", "reaped", "tests/crash/test_workers.py::test_a_worker_that_outlives_its_daemon_is_ended_at_the_next_start"),
    54: ("stop twice, stop finished, delete running", "once, FAILED_PRECONDITION", "tests/bad_inputs/test_runs.py::test_stop_twice_and_resume_or_delete_while_running_are_conflicts"),
    55: ("ENOSPC at each write", "nothing acknowledged is lost", "tests/crash/test_disk.py::test_a_whole_run_passes_any_refused_write_of_daemon_and_worker"),
    56: ("EIO at each write", "nothing acknowledged is lost", "tests/crash/test_disk.py::test_a_run_passes_any_refused_write_of_the_daemon"),
    57: ("home read-only", "refused with a cure", "tests/crash/test_disk.py::test_a_read_only_home_is_refused_in_words"),
    58: ("kill -9 at each failpoint", "nothing acknowledged is lost", "tests/crash/test_points.py::test_a_run_survives_death_at_every_point_of_its_life"),
    59: ("torn WAL, corrupt page, newer store", "refused with a cure", "tests/test_schema.py::test_a_torn_end_of_the_journal_loses_whole_transactions_only"),
    60: ("home deleted while running", "told", "tests/crash/test_disk.py::test_a_state_folder_deleted_under_the_daemon_is_said_and_nothing_hangs"),
    61: ("too few file descriptors", "serving again", "tests/crash/test_disk.py::test_with_few_file_descriptors_it_serves_or_refuses_in_words"),
    62: ("second daemon", "refused with the other's pid", "tests/bad_inputs/test_config.py::test_a_second_daemon_names_the_first"),
    63: ("stale lock or socket", "recovered", "tests/crash/test_cycles.py::test_nothing_acknowledged_is_lost_repeated_or_disordered_by_kill_9"),
    64: ("SIGTERM while busy, twice, SIGSTOP", "drains in order", "tests/crash/test_signals.py::test_sigterm_drains_in_order_and_watchers_see_it_all"),
    65: ("sleep of the machine", "goes on", SLEEP),
    66: ("upgrade and downgrade", "migrates or refuses", "tests/test_schema.py::test_a_store_of_version_1_keeps_everything_and_learns_to_shrink"),
    67: ("the six guarantees through death", "hold", "tests/watch/test_model.py::test_a_watch_is_ordered_unique_atomic_reliable_resumable_and_bookmarkable"),
    68: ("1 000 watchers", "served", "tests/watch/test_crowd.py::test_whoever_writes_is_not_behind_the_whole_crowd"),
    69: ("one stalled for an hour", "costs nobody anything", STALL),
    70: ("resume storm", "served", "tests/watch/test_crowd.py::test_a_storm_of_resumptions_gets_everything_while_others_write"),
    71: ("compaction while reading", "never a silent gap", "tests/test_events.py::test_compacting_what_a_watcher_has_not_read_yet_is_no_silent_gap"),
    72: ("a filter that matches nothing", "bookmarks all the same", "tests/test_events.py::test_watch_is_bookmarkable_when_its_filter_matches_nothing"),
    73: ("no token, a wrong one", "UNAUTHENTICATED", WIRE),
    74: ("foreign Host", "refused", "tests/web/test_guard.py::test_a_host_that_is_not_ours_is_refused_even_with_the_token"),
    75: ("foreign Origin", "refused", "tests/web/test_guard.py::test_a_foreign_origin_is_refused_even_with_a_session"),
    76: ("simple POST from a page", "refused", "tests/web/test_guard.py::test_a_post_a_form_could_send_is_refused"),
    77: ("any other address without TLS", "refuses to start", "tests/security/test_transport.py::test_serve_refuses_to_start_in_the_open"),
    78: ("files others can read", "refused", "tests/security/test_tokens.py::test_a_token_file_others_can_touch_is_refused"),
    79: ("what errors say", "nothing of our insides", "tests/bad_inputs/test_fuzz.py::test_no_request_breaks_anything"),
    80: ("log injection", "one line an event", "tests/security/test_logs.py::test_in_the_file_every_event_is_one_object_on_one_line"),
    81: ("pickle anywhere", "lint failure", "tests/security/test_tree.py::test_nothing_runs_what_it_reads"),
    82: ("pip-audit", "clean", ".ci/audit"),
    83: ("markup in a run's name", "no script", "tests/web/test_pages.py::test_text_from_people_never_becomes_markup"),
    84: ("URLs as input", "none accepted", "tests/security/test_paths.py::test_addresses_are_no_models"),
}  # fmt: skip
