/* Plans against brute force: random tensors, cut in random ways over random numbers of ranks, must give the bytes that
   the uncut tensors give. */
#define _DEFAULT_SOURCE 1
#include "lorasync.h"
#include "test.h"
#include "ranks.h"
#include "random_case.h"

static int check_plan_image(const random_case *c, lorasync_plan *plan)
{
    const lorasync_image *image = lorasync_plan_image(plan);
    return check_image(c, image, image ? image->payload : NULL);
}

static void run_case(rank_context *x)
{
    random_case       *c = (random_case *)x->user;
    lorasync_plan_desc d;
    lorasync_plan     *plan;
    lorasync_error     err;
    int                run;
    fill_desc(&d, c, x);
    err.text[0]        = 0;
    c->status[x->rank] = lorasync_plan_create(&d, &plan, &err);
    snprintf(c->text[x->rank], sizeof c->text[0], "%s", err.text);
    if (c->status[x->rank] < 0) return;
    for (run = 0; run < 4 && !c->wrong[x->rank]; run++) { /* again and again: nothing may be left over from the run
                                                             before */
        lorasync_status s = lorasync_plan_begin(plan, &err);
        if (s == LORASYNC_OK || s == LORASYNC_E_NAN) s = lorasync_plan_wait(plan, &err);
        if (s < 0) {
            c->status[x->rank] = s;
            snprintf(c->text[x->rank], sizeof c->text[0], "%s", err.text);
            break;
        }
        if (c->kind == LORASYNC_GATHER && x->rank == c->root) c->wrong[x->rank] = check_plan_image(c, plan);
        if (c->kind == LORASYNC_GATHER && x->rank != c->root && lorasync_plan_image(plan)) c->wrong[x->rank] = 9;
        if (c->kind == LORASYNC_GATHER_ALL) c->wrong[x->rank] = check_plan_image(c, plan);
        c->wrong[x->rank] += check_wanted(c, &c->want[x->rank]);
    }
    lorasync_plan_free(plan);
}

static void gather_random(void) { random_cases(LORASYNC_GATHER, 700, 0, run_case); }
static void gather_all_random(void) { random_cases(LORASYNC_GATHER_ALL, 300, 0, run_case); }
static void scatter_random(void) { random_cases(LORASYNC_SCATTER, 500, 0, run_case); }
static void reshard_random(void) { random_cases(LORASYNC_RESHARD, 700, 0, run_case); }

static void large_tensors(void)
{
    random_cases(LORASYNC_GATHER, 12, 1, run_case);
    random_cases(LORASYNC_GATHER_ALL, 6, 1, run_case);
    random_cases(LORASYNC_SCATTER, 8, 1, run_case);
    random_cases(LORASYNC_RESHARD, 12, 1, run_case);
}

int main(void)
{
    RUN(gather_random);
    RUN(gather_all_random);
    RUN(scatter_random);
    RUN(reshard_random);
    RUN(large_tensors);
    return test_summary("test_plan");
}
