// What Flux makes of objects: by kstatus alone, and with health check expressions of a Kustomization.
//
//	kstatus '{"current": "…", "failed": "…"}' <objects >verdicts
//
// Objects and verdicts are in JSON, one a line.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

type verdict struct {
	Kstatus     status.Status `json:"kstatus"`
	Message     string        `json:"message"`
	Expressions status.Status `json:"expressions"`
}

func main() {
	if err := judge(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "kstatus:", err)
		os.Exit(1)
	}
}

func judge(objects io.Reader, verdicts io.Writer) error {
	if len(os.Args) != 2 {
		return fmt.Errorf("expected one argument, the expressions in JSON")
	}
	var expressions kustomize.HealthCheckExpressions
	if err := json.Unmarshal([]byte(os.Args[1]), &expressions); err != nil {
		return err
	}
	evaluator, err := cel.NewStatusEvaluator(&expressions)
	if err != nil {
		return err
	}
	encoder := json.NewEncoder(verdicts)
	lines := bufio.NewScanner(objects)
	for lines.Scan() {
		object := &unstructured.Unstructured{}
		if err := object.UnmarshalJSON(lines.Bytes()); err != nil {
			return err
		}
		plain, err := status.Compute(object)
		if err != nil {
			return err
		}
		evaluated, err := evaluator.Evaluate(context.Background(), object)
		if err != nil {
			return err
		}
		if err := encoder.Encode(verdict{plain.Status, plain.Message, evaluated.Status}); err != nil {
			return err
		}
	}
	return lines.Err()
}
