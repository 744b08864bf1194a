// What Argo CD's own libraries make of VCPUSets, with the customizations of a patch of the ConfigMap argocd-cm.
//
//	argocd argocd-cm.yaml <questions >answers
//
// Questions and answers are in JSON, one a line.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/argoproj/argo-cd/gitops-engine/pkg/diff"
	"github.com/argoproj/argo-cd/gitops-engine/pkg/health"
	"github.com/argoproj/argo-cd/v3/pkg/apis/application/v1alpha1"
	"github.com/argoproj/argo-cd/v3/util/argo/normalizers"
	"github.com/argoproj/argo-cd/v3/util/lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

const (
	kind    = "vcpuset.dev/VCPUSet"
	healths = "resource.customizations.health.vcpuset.dev_VCPUSet"
	actions = "resource.customizations.actions.vcpuset.dev_VCPUSet"
)

// An object of the cluster, perhaps with its manifest in Git and `ignoreDifferences` of its Application.
type question struct {
	Live   *unstructured.Unstructured           `json:"live"`
	Git    *unstructured.Unstructured           `json:"git"`
	Ignore []v1alpha1.ResourceIgnoreDifferences `json:"ignoreDifferences"`
}

// Health, the actions that are offered, the object that each of them makes, and whether the object is out of sync.
type answer struct {
	Health    *health.HealthStatus                  `json:"health"`
	Actions   []v1alpha1.ResourceAction             `json:"actions"`
	Results   map[string]*unstructured.Unstructured `json:"results"`
	OutOfSync bool                                  `json:"outOfSync"`
}

func main() {
	if err := respond(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "argocd:", err)
		os.Exit(1)
	}
}

func respond(questions io.Reader, answers io.Writer) error {
	if len(os.Args) != 2 {
		return fmt.Errorf("expected one argument, the patch of argocd-cm")
	}
	text, err := os.ReadFile(os.Args[1])
	if err != nil {
		return err
	}
	var patch struct {
		Data map[string]string `json:"data"`
	}
	if err := yaml.UnmarshalStrict(text, &patch); err != nil {
		return err
	}
	override := v1alpha1.ResourceOverride{HealthLua: patch.Data[healths], Actions: patch.Data[actions]}
	overrides := map[string]v1alpha1.ResourceOverride{kind: override}
	encoder := json.NewEncoder(answers)
	lines := bufio.NewScanner(questions)
	for lines.Scan() {
		var asked question
		if err := json.Unmarshal(lines.Bytes(), &asked); err != nil {
			return err
		}
		found, err := asked.answer(overrides)
		if err != nil {
			return err
		}
		if err := encoder.Encode(found); err != nil {
			return err
		}
	}
	return lines.Err()
}

func (asked *question) answer(overrides map[string]v1alpha1.ResourceOverride) (*answer, error) {
	found := &answer{Results: map[string]*unstructured.Unstructured{}}
	var err error
	if found.Health, err = health.GetResourceHealth(asked.Live, lua.ResourceHealthOverrides(overrides)); err != nil {
		return nil, err
	}
	engine := lua.VM{ResourceOverrides: overrides}
	discovery, err := engine.GetResourceActionDiscovery(asked.Live)
	if err != nil {
		return nil, err
	}
	if found.Actions, err = engine.ExecuteResourceActionDiscovery(asked.Live, discovery); err != nil {
		return nil, err
	}
	for _, offered := range found.Actions {
		action, err := engine.GetResourceAction(asked.Live, offered.Name)
		if err != nil {
			return nil, err
		}
		made, err := engine.ExecuteResourceAction(asked.Live, action.ActionLua, nil)
		if err != nil {
			return nil, err
		}
		if len(made) != 1 || made[0].K8SOperation != lua.PatchOperation {
			return nil, fmt.Errorf("%s makes %v, and not one patch", offered.Name, made)
		}
		found.Results[offered.Name] = made[0].UnstructuredObj
	}
	if asked.Git != nil {
		options := normalizers.IgnoreNormalizerOpts{}
		normalizer, err := normalizers.NewIgnoreNormalizer(asked.Ignore, overrides, options)
		if err != nil {
			return nil, err
		}
		compared, err := diff.Diff(asked.Git, asked.Live, diff.WithNormalizer(normalizer))
		if err != nil {
			return nil, err
		}
		found.OutOfSync = compared.Modified
	}
	return found, nil
}
